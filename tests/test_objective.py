"""Noise levels, weights and losses, each against its closed form."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule
from training.config import ObjectiveConfig
from training.imports import load_object
from training.objective import (
    edm,
    huber_c,
    image_losses,
    lognormal,
    loss_weight,
    min_snr,
    noise_levels,
    offset_noise,
    soft_min_snr,
    uniform_timestep,
)
from training.uncertainty import Uncertainty, weigh

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
    schedule, config = NoiseSchedule.flow(), ObjectiveConfig("logit_normal", ln_sigma_mean=0.3, ln_sigma_std=0.8)
    t = schedule.timestep(noise_levels(U, schedule, config)) / 1000
    logit = torch.logit(t)
    inside = (U > 0.01) & (U < 0.99)
    expected = torch.distributions.Normal(torch.tensor(0.3, dtype=torch.float64), 0.8).icdf(U)
    torch.testing.assert_close(logit[inside], expected[inside], rtol=0, atol=1e-6)


def test_logit_normal_is_the_same_by_another_name() -> None:
    for schedule in SCHEDULES.values():
        of_both = [
            noise_levels(U, schedule, ObjectiveConfig(name, ln_sigma_mean=0.3, ln_sigma_std=0.8))
            for name in ("lognormal", "logit_normal")
        ]
        assert torch.equal(*of_both)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "flow_prediction"])
def test_uniform_is_uniform_in_timesteps(name: str) -> None:
    schedule = SCHEDULES[name]
    t = schedule.timestep(uniform_timestep(U, schedule))
    low, high = (0, 999) if name != "flow_prediction" else (1, 999)
    torch.testing.assert_close(t, low + U * (high - low), rtol=0, atol=1e-6)
    config = ObjectiveConfig(noise_distribution="uniform")
    assert torch.equal(noise_levels(U, schedule, config), uniform_timestep(U, schedule))


@pytest.mark.parametrize("side", [16, 64, 128])
def test_resolution_shift_of_the_log_normal(side: int) -> None:
    """ln SNR falls by 2 ln(side / 32) (Hoogeboom et al. 2023, section 3.1)."""
    schedule, config = NoiseSchedule.flow(), ObjectiveConfig(resolution_shift=32)
    as_meant = noise_levels(U, schedule, config, 32.0**2)
    assert torch.equal(as_meant, noise_levels(U, schedule, ObjectiveConfig()))
    fall = schedule.log_snr(as_meant) - schedule.log_snr(noise_levels(U, schedule, config, float(side**2)))
    inside = (U > 0.01) & (U < 0.99)
    torch.testing.assert_close(fall[inside], torch.full_like(U, 2 * math.log(side / 32))[inside], rtol=0, atol=1e-3)


def test_resolution_shift_of_a_flow_is_that_of_sd3() -> None:
    """t -> r t / (1 + (r - 1) t), r = sqrt(m / n) (Esser et al. 2024, equation 23)."""
    schedule, config = NoiseSchedule.flow(), ObjectiveConfig("uniform", resolution_shift=512)
    r, last = 1.5, 999 / 1.5 / (1 + 999 / 1.5)  # beyond `last` the shifted time would be above 999/1000
    t = 1 / 1000 + U * (last - 1 / 1000)
    shifted = schedule.timestep(noise_levels(U, schedule, config, (512 * r) ** 2)) / 1000
    torch.testing.assert_close(shifted, r * t / (1 + (r - 1) * t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("distribution", ["uniform", "lognormal"])
@pytest.mark.parametrize("side", [8, 300])
def test_a_shifted_distribution_is_cut_off_not_piled_up(name: str, distribution: str, side: int) -> None:
    schedule, config = SCHEDULES[name], ObjectiveConfig(distribution, resolution_shift=32)
    sigma = noise_levels(U, schedule, config, float(side**2))
    assert schedule.sigma_min <= sigma.min() and sigma.max() <= schedule.sigma_max
    assert (sigma.diff() > 0).all()


def test_resolution_shift_by_image() -> None:
    for distribution in ("uniform", "lognormal"):
        config = ObjectiveConfig(distribution, resolution_shift=64)
        pixels = torch.tensor([64 * 64, 96 * 40, 128 * 128])
        together = noise_levels(U[[50, 10_000, 19_000]], SCHEDULES["epsilon"], config, pixels)
        for place, row in enumerate((50, 10_000, 19_000)):
            alone = noise_levels(U[[row]], SCHEDULES["epsilon"], config, float(pixels[place]))
            torch.testing.assert_close(together[[place]], alone, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="number of pixels"):
        noise_levels(U, SCHEDULES["epsilon"], config)


OWN = """
import torch

class Levels:
    @staticmethod
    def square(u, schedule, scale=1.0):
        assert u.dtype == torch.float64 and u.ndim == 1
        return (schedule.sigma_min + scale * u ** 2).float()

def few(u, schedule): return u[1:] + 1
def whole(u, schedule): return torch.ones(len(u), dtype=torch.int64)
def listed(u, schedule): return u.tolist()
def nan(u, schedule): return u * float("nan") + 1
def infinite(u, schedule): return u / 0
def negative(u, schedule): return -1 - u
def large(u, schedule): return u + 1e6
constant = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """Levels by a function of a module that lies on the path."""
    (tmp_path / "own_levels.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "own_broken.py").write_text("import no_such_dependency", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def levels(name: str, pixels: float | None = None, **settings: Any) -> torch.Tensor:
        config = ObjectiveConfig(f"own_levels:{name}", **settings)
        return noise_levels(U.float(), SCHEDULES["epsilon"], config, pixels)

    return levels


def test_levels_of_ones_own(own: Callable[..., torch.Tensor]) -> None:
    low, u = SCHEDULES["epsilon"].sigma_min, U.float().double()
    torch.testing.assert_close(own("Levels.square"), low + u**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(own("Levels.square", noise_args={"scale": 3}), low + 3 * u**2, rtol=1e-6, atol=0)
    shifted = own("Levels.square", 64.0**2, resolution_shift=32)
    torch.testing.assert_close(shifted, 2 * (low + u**2), rtol=1e-6, atol=0)
    assert own("Levels.square", 1.0, resolution_shift=32).min() == low


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("few", {}, "must give a floating-point tensor"),
        ("whole", {}, r"it gave torch.int64 \[20000\]"),
        ("listed", {}, "it gave list"),
        ("nan", {}, "gave sigma nan"),
        ("infinite", {}, "gave sigma inf; the schedule has sigmas from 0.0291672 to 14.6146"),
        ("negative", {}, "gave sigma -1"),
        ("large", {}, "gave sigma 1e"),
        ("constant", {}, "is not a function"),
        ("few", {"noise_args": {"sclae": 3}}, "noise_args: own_levels:few.*'sclae'"),
        ("fw", {}, "noise_distribution: own_levels has no fw: did you mean few"),
    ],
)
def test_levels_of_ones_own_that_cannot_be_used(
    own: Callable[..., torch.Tensor], name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        own(name, **settings)
    assert "\n" not in str(caught.value)


def test_objects_by_import_path(own: Callable[..., torch.Tensor]) -> None:
    assert load_object("torch.optim:AdamW", "optimizer.optimizer") is torch.optim.AdamW
    assert load_object("torch:nn.Linear.forward", "key") is torch.nn.Linear.forward
    for path, message in {
        "torch.optim.AdamW": "key: 'torch.optim.AdamW' is not of the form package.module:name",
        "torch.optim:": "is not of the form",
        ".optim:AdamW": "is not of the form",
        "torch:a:b": "is not of the form",
        "no_such_package.sub:f": "key: there is no module no_such_package; ",
        "torch.no_such:f": "key: there is no module torch.no_such; ",
        "torch.optim:AdamWW": "key: torch.optim has no AdamWW: did you mean AdamW?",
        "own_broken:f": "key: own_broken needs the module no_such_dependency, which is not installed",
    }.items():
        with pytest.raises(InputError) as caught:
            load_object(path, "key")
        assert message in str(caught.value) and "\n" not in str(caught.value)


EDM_SNR = 0.5**2 / SIGMA**2
FROM_X0 = {  # |x0 error|^2 = this |output error|^2, in terms of the SNR; for edm, of unit variance after its scaling
    "epsilon": 1 / SNR,
    "sample": torch.ones_like(SNR),
    "v_prediction": 1 / (SNR + 1),
    "flow_prediction": 1 / (1 + SNR.sqrt()) ** 2,
    "edm": 1 / (EDM_SNR + 1),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_closed_forms_of_the_weights(name: str, gamma: float) -> None:
    schedule, snr, from_x0 = SCHEDULES[name], EDM_SNR if name == "edm" else SNR, FROM_X0[name]
    soft = snr * gamma / (snr + gamma)
    torch.testing.assert_close(min_snr(SIGMA, schedule, gamma), snr.clamp(max=gamma) * from_x0, rtol=1e-12, atol=0)
    torch.testing.assert_close(soft_min_snr(SIGMA, schedule, gamma), soft * from_x0, rtol=1e-12, atol=0)
    torch.testing.assert_close(edm(SIGMA, schedule), (snr + 1) * from_x0, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_that_of_diffusers_scripts(prediction_type: str) -> None:
    stock = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(stock, torch.arange(1000)).double()
    expected = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
    weight = min_snr(schedule.sigma(torch.arange(1000)), schedule, 5.0)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)


def test_soft_min_snr_is_a_smooth_minimum() -> None:
    for name, schedule in SCHEDULES.items():
        ratio = soft_min_snr(SIGMA, schedule, 5.0) / min_snr(SIGMA, schedule, 5.0)
        assert ratio.min() >= 0.5 and ratio.max() < 1, name
        ends = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float64)
        both = [weight(ends, schedule, 1.0) for weight in (soft_min_snr, min_snr)]
        torch.testing.assert_close(*both, rtol=0.02, atol=0)


def test_soft_min_snr_of_gamma_1_is_that_of_its_paper() -> None:
    """Crowson et al. 2024: 1 / (sigma^2 + 1/4) on x0, the standard deviation of the data being 0.5."""
    schedule = SCHEDULES["edm"]
    on_x0 = soft_min_snr(SIGMA, schedule, 1.0) / schedule.scaling(SIGMA).c_out ** 2
    torch.testing.assert_close(on_x0, 1 / (SIGMA**2 + 1 / 4), rtol=1e-12, atol=0)


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
    closed = [
        (min_snr(SIGMA, schedule, 5.0), snr.clamp(max=5) / data**2),
        (soft_min_snr(SIGMA, schedule, 5.0), 1 / (1 / snr + 1 / 5) / data**2),
        (edm(SIGMA, schedule), (SIGMA**2 + data**2) / (SIGMA * data) ** 2),
    ]
    for of_output, of_x0 in closed:
        torch.testing.assert_close(of_output * error.square().mean(1), of_x0 * error_x0, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["v_prediction", "edm"])
def test_edm_weight_is_one_for_unit_variance_outputs(name: str) -> None:
    torch.testing.assert_close(edm(SIGMA, SCHEDULES[name]), torch.ones_like(SIGMA), rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_weights_at_zero_snr(prediction_type: str) -> None:
    """Pure noise says nothing of x0: where the SNR is zero, min-SNR weighs x0 by the SNR, which is zero, not NaN."""
    schedule = NoiseSchedule.cosine(prediction_type=prediction_type, zero_snr=True)
    assert schedule.sigma_max > 4000
    sigma = torch.tensor([schedule.sigma_max, 1e18, 1e100], dtype=torch.float64)
    snr = torch.tensor([schedule.sigma_max**-2, 1e-36, 1e-200], dtype=torch.float64)
    for weight in (min_snr(sigma, schedule, 5.0), soft_min_snr(sigma, schedule, 5.0)):
        torch.testing.assert_close(weight, snr, rtol=1e-6, atol=0)
    torch.testing.assert_close(edm(sigma, schedule), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    output, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for config in (ObjectiveConfig(weighting=name) for name in ("none", "min_snr", "soft_min_snr", "edm")):
        assert image_losses(output, target, loss_weight(sigma, schedule, config)).isfinite().all()


def test_epsilon_weights_are_at_their_limits_where_the_snr_is_zero() -> None:
    """min(SNR, gamma) / SNR is 1 at SNR 0, where its numerator and its denominator both vanish."""
    schedule, sigma = SCHEDULES["epsilon"], torch.tensor([1e18, 1e100, 1e200], dtype=torch.float64)
    for weight in (min_snr(sigma, schedule, 5.0), soft_min_snr(sigma, schedule, 5.0)):
        torch.testing.assert_close(weight, torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)


def test_weighting_by_name() -> None:
    schedule = SCHEDULES["epsilon"]
    assert torch.equal(loss_weight(SIGMA, schedule, ObjectiveConfig()), torch.ones_like(SIGMA))
    five, two = (loss_weight(SIGMA, schedule, ObjectiveConfig(weighting="min_snr", snr_gamma=g)) for g in (None, 2.0))
    assert torch.equal(five, min_snr(SIGMA, schedule, 5.0)) and torch.equal(two, min_snr(SIGMA, schedule, 2.0))
    assert torch.equal(loss_weight(SIGMA, schedule, ObjectiveConfig(weighting="edm")), edm(SIGMA, schedule))
    soft = loss_weight(SIGMA, schedule, ObjectiveConfig(weighting="soft_min_snr", snr_gamma=2.0))
    assert torch.equal(soft, soft_min_snr(SIGMA, schedule, 2.0))


def test_image_losses() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(2, 3, 2, 4, 4)
    weight = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    expected = [float(w) * F.mse_loss(output[i], target[i]).item() for i, w in enumerate(weight)]
    assert image_losses(output, target, weight).tolist() == pytest.approx(expected, rel=1e-6)
    assert image_losses(output.bfloat16(), target.bfloat16(), weight).dtype == torch.float32
    assert math.isclose(image_losses(output, output, weight).sum().item(), 0)


@pytest.mark.parametrize("c", [0.01, 0.1, 2.0])
def test_pseudo_huber(c: float) -> None:
    difference = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    expected = (2 * c * ((difference**2 + c**2).sqrt() - c)).flatten(1).mean(1) * weight
    output = difference.requires_grad_()
    losses = image_losses(output, torch.zeros_like(output), weight, c)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(losses.sum(), output)
    closed = 2 * c * difference / (difference**2 + c**2).sqrt() * weight.view(-1, 1, 1, 1) / 32
    torch.testing.assert_close(slope, closed, rtol=1e-12, atol=0)


def test_pseudo_huber_is_square_near_zero_and_linear_far_from_it() -> None:
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, 1, 1, 1)
    for small in (1e-6, 1e-4):  # in float32, where sqrt(d^2 + c^2) - c would be zero
        assert image_losses(zero + small, zero, one, 0.1).item() == pytest.approx(small**2, rel=1e-5)
    assert image_losses(zero + 1e4, zero, one, 0.1).item() == pytest.approx(0.2 * 1e4, rel=1e-4)
    assert huber_c(ObjectiveConfig()) is None
    assert huber_c(ObjectiveConfig(loss="huber")) == 0.1 and huber_c(ObjectiveConfig(loss="huber", huber_c=2.0)) == 2.0


def test_offset_noise_is_white_noise_and_one_number_for_each_channel() -> None:
    random = torch.Generator().manual_seed(0)
    noise, normals = torch.randn(4000, 2, 4, 4, generator=random), torch.randn(4000, 2, generator=random)
    offset = offset_noise(noise, normals, 0.5)
    torch.testing.assert_close(offset.mean((2, 3)), noise.mean((2, 3)) + 0.5 * normals, rtol=1e-5, atol=1e-6)
    covariance = torch.cov(offset.flatten(1).T)
    expected = torch.eye(32) + 0.25 * torch.block_diag(torch.ones(16, 16), torch.ones(16, 16))
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.12)
    assert offset_noise(noise.double(), normals, 0.5).dtype == torch.float64
    assert torch.equal(offset_noise(noise, normals, 0.0), noise)


def test_uncertainty_starts_as_no_weighting_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    one, other = Uncertainty(), Uncertainty()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.frequencies, other.frequencies) and torch.equal(one.phases, other.phases)
    assert set(one.state_dict()) == {"weight", "bias"}
    losses = torch.rand(31)
    assert torch.equal(weigh(losses, one(SIGMA)), losses)


def test_uncertainty_learns_the_logarithm_of_the_mean_loss() -> None:
    """`weigh` is least, at each level, for u = ln E[loss], whatever weight the loss had before."""
    usual = 0.02 + 3 / (1 + SIGMA.float())
    scatter = torch.rand(400, len(SIGMA), generator=torch.Generator().manual_seed(0)) * 2
    losses = usual * scatter / scatter.mean(0)
    model = Uncertainty()
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(300):
        adam.zero_grad()
        weigh(losses, model(SIGMA)).mean().backward()
        adam.step()
    torch.testing.assert_close(model(SIGMA).exp(), usual, rtol=0.05, atol=0)
    loss = torch.tensor([2.0], requires_grad=True)
    weigh(loss, model(SIGMA[:1])).backward()
    assert loss.grad is not None and loss.grad.item() == pytest.approx(1 / model(SIGMA[:1]).exp().item())


def test_uncertainty_is_not_rounded_under_autocast() -> None:
    model = Uncertainty()
    torch.nn.init.normal_(model.weight)
    expected = model(SIGMA)
    with torch.autocast("cpu", torch.bfloat16):
        u = model(SIGMA)
    assert u.dtype == torch.float32 and torch.equal(u, expected)
    features = math.sqrt(2) * torch.cos(SIGMA[:, None].log() / 4 * model.frequencies + model.phases)
    torch.testing.assert_close(u.double(), features @ model.weight.double() + model.bias.double(), rtol=1e-4, atol=1e-4)
    assert model(torch.tensor([4096.0, 1e18], dtype=torch.float64)).isfinite().all()
