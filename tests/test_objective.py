"""Noise levels and weights, each against its closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion_unet.schedule import NoiseSchedule
from training.config import ObjectiveConfig
from training.objective import edm, image_losses, lognormal, loss_weight, min_snr, noise_levels, uniform_timestep

U = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
SIGMA = torch.logspace(-1.5, 1.5, 31, dtype=torch.float64)
SNR = SIGMA**-2

SCHEDULES = {
    "epsilon": NoiseSchedule.scaled_linear(),
    "sample": NoiseSchedule.scaled_linear(prediction_type="sample"),
    "v_prediction": NoiseSchedule.cosine(prediction_type="v_prediction", zero_snr=True),
    "flow_prediction": NoiseSchedule.flow(),
    "edm": NoiseSchedule.edm(sigma_data=0.5),
}


def test_lognormal_is_its_inverse_distribution_function() -> None:
    sigma = lognormal(U, -0.6, 1.2, 1e-12, 1e12)
    normal = torch.distributions.Normal(torch.tensor(-0.6, dtype=torch.float64), 1.2)
    torch.testing.assert_close(sigma, normal.icdf(U).exp(), rtol=1e-12, atol=0)
    assert abs(sigma.log().mean() + 0.6) < 1e-3 and abs(sigma.log().std() - 1.2) < 1e-3


def test_lognormal_is_cut_off_not_piled_up_at_the_ends() -> None:
    sigma = lognormal(torch.cat([torch.zeros(1), U]), -0.6, 1.2, 0.2, 2.0)
    assert sigma.min() >= 0.2 and sigma.max() <= 2.0
    assert (sigma == 0.2).sum() <= 1 and (sigma == 2.0).sum() == 0
    normal = torch.distributions.Normal(torch.tensor(-0.6, dtype=torch.float64), 1.2)
    low, high = normal.cdf(torch.tensor([0.2, 2.0], dtype=torch.float64).log())
    torch.testing.assert_close((normal.cdf(sigma[1:].log()) - low) / (high - low), U, rtol=0, atol=1e-12)


def test_logit_normal_of_a_flow() -> None:
    schedule, config = NoiseSchedule.flow(), ObjectiveConfig(ln_sigma_mean=0.3, ln_sigma_std=0.8)
    t = schedule.timestep(noise_levels(U, schedule, config)) / 1000
    logit = torch.logit(t)
    inside = (U > 0.01) & (U < 0.99)
    expected = torch.distributions.Normal(torch.tensor(0.3, dtype=torch.float64), 0.8).icdf(U)
    torch.testing.assert_close(logit[inside], expected[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "flow_prediction"])
def test_uniform_is_uniform_in_timesteps(name: str) -> None:
    schedule = SCHEDULES[name]
    t = schedule.timestep(uniform_timestep(U, schedule))
    low, high = (0, 999) if name != "flow_prediction" else (1, 999)
    torch.testing.assert_close(t, low + U * (high - low), rtol=0, atol=1e-6)
    config = ObjectiveConfig(noise_distribution="uniform")
    assert torch.equal(noise_levels(U, schedule, config), uniform_timestep(U, schedule))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("epsilon", SNR.clamp(max=5) / SNR),
        ("sample", SNR.clamp(max=5)),
        ("v_prediction", SNR.clamp(max=5) / (SNR + 1)),
        ("flow_prediction", SNR.clamp(max=5) / (1 + SNR.sqrt()) ** 2),
    ],
)
def test_min_snr_closed_forms(name: str, expected: torch.Tensor) -> None:
    torch.testing.assert_close(min_snr(SIGMA, SCHEDULES[name], 5.0), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_weights_are_of_the_error_of_x0(name: str) -> None:
    """weight(output) * |output error|^2 = weight(x0) * |x0 error|^2, by the denoiser's own coefficients."""
    schedule = SCHEDULES[name]
    torch.manual_seed(0)
    x0, noise, error = torch.randn(3, len(SIGMA), 7, dtype=torch.float64)
    target = schedule.target(x0, noise, SIGMA)
    _, c_skip, c_out, _ = schedule.scaling(SIGMA)
    x = x0 + SIGMA[:, None] * noise
    error_x0 = (c_skip[:, None] * x + c_out[:, None] * (target + error) - x0).square().mean(1)
    data = schedule.sigma_data
    snr = data**2 / SIGMA**2
    closed = {min_snr: snr.clamp(max=5) / data**2, edm: (SIGMA**2 + data**2) / (SIGMA * data) ** 2}
    for weight, of_x0 in closed.items():
        of_output = weight(SIGMA, schedule, 5.0) if weight is min_snr else weight(SIGMA, schedule)
        torch.testing.assert_close(of_output * error.square().mean(1), of_x0 * error_x0, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["v_prediction", "edm"])
def test_edm_weight_is_one_for_unit_variance_outputs(name: str) -> None:
    torch.testing.assert_close(edm(SIGMA, SCHEDULES[name]), torch.ones_like(SIGMA), rtol=1e-12, atol=0)


def test_min_snr_is_finite_at_zero_snr() -> None:
    schedule = SCHEDULES["v_prediction"]
    assert schedule.sigma_max > 4000
    weight = min_snr(torch.tensor([schedule.sigma_max, 1e18], dtype=torch.float64), schedule, 5.0)
    torch.testing.assert_close(
        weight, torch.tensor([schedule.sigma_max, 1e18], dtype=torch.float64) ** -2, rtol=1e-6, atol=0
    )


def test_weighting_by_name() -> None:
    schedule = SCHEDULES["epsilon"]
    assert torch.equal(loss_weight(SIGMA, schedule, ObjectiveConfig()), torch.ones_like(SIGMA))
    five, two = (loss_weight(SIGMA, schedule, ObjectiveConfig(weighting="min_snr", snr_gamma=g)) for g in (None, 2.0))
    assert torch.equal(five, min_snr(SIGMA, schedule, 5.0)) and torch.equal(two, min_snr(SIGMA, schedule, 2.0))
    assert torch.equal(loss_weight(SIGMA, schedule, ObjectiveConfig(weighting="edm")), edm(SIGMA, schedule))


def test_image_losses() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(2, 3, 2, 4, 4)
    weight = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    expected = [float(w) * F.mse_loss(output[i], target[i]).item() for i, w in enumerate(weight)]
    assert image_losses(output, target, weight).tolist() == pytest.approx(expected, rel=1e-6)
    assert image_losses(output.bfloat16(), target.bfloat16(), weight).dtype == torch.float32
    assert math.isclose(image_losses(output, output, weight).sum().item(), 0)
