"""Noise levels against diffusers' tables, closed forms, and configs as they are found in the wild."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule

V = "v_prediction"
# numpy's remark on how diffusers' schedulers turn tensors into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TABLES = {
    "linear": (NoiseSchedule.linear(), {"beta_schedule": "linear"}),
    "scaled_linear": (
        NoiseSchedule.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "few": (
        NoiseSchedule.linear(T=50, start=0.001, end=0.3),
        {"num_train_timesteps": 50, "beta_start": 0.001, "beta_end": 0.3},
    ),
    "zero SNR": (
        NoiseSchedule.scaled_linear(prediction_type=V, zero_snr=True),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    ),
}
ALL = [
    *(schedule for schedule, _ in TABLES.values()),
    NoiseSchedule.flow(),
    NoiseSchedule.flow(shift=3.0),
    NoiseSchedule.edm(),
    NoiseSchedule.edm(sigma_data=1.0, sigma_min=0.01, sigma_max=50.0),
]
KINDS = [
    NoiseSchedule.linear(),
    NoiseSchedule.linear(prediction_type="sample"),
    NoiseSchedule.linear(prediction_type=V),
    NoiseSchedule.flow(),
    NoiseSchedule.edm(),
    NoiseSchedule.from_config({"_class_name": "EDMEulerScheduler", "prediction_type": V, "sigma_data": 0.7}),
]


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_diffusers(name: str) -> None:
    schedule, config = TABLES[name]
    T = schedule.num_train_timesteps
    oracle = EulerDiscreteScheduler(**config)
    sigma = schedule.sigma(torch.arange(T))
    assert sigma.dtype == torch.float64
    expected = oracle.sigmas[:-1].flip(0).double()
    abar, stock_abar = 1 / (1 + sigma**2), 1 / (1 + expected**2)
    # float32: a product of T factors near 1, and for zero SNR the difference of two nearly equal roots at the last
    torch.testing.assert_close(abar, stock_abar, rtol=2e-3 if schedule.zero_snr else 5e-5, atol=1e-8)
    assert schedule.sigma_min == float(sigma[0]) and schedule.sigma_max == float(sigma[-1])


def test_zero_terminal_snr_is_exact_in_float64() -> None:
    """Algorithm 1 of arXiv:2305.08891 in numpy: sqrt(abar) shifted and scaled, first entry kept, last one 0."""
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    rescaled = (root - root[-1]) * root[0] / (root[0] - root[-1])
    schedule = NoiseSchedule.scaled_linear(prediction_type=V, zero_snr=True)
    sigma = schedule.sigma(torch.arange(1000)).numpy()
    np.testing.assert_allclose(sigma[:-1], np.sqrt(1 / rescaled[:-1] ** 2 - 1), rtol=1e-9)
    assert sigma[-1] == pytest.approx(math.sqrt(2**24 - 1), rel=1e-9)
    assert schedule.zero_snr and not NoiseSchedule.scaled_linear().zero_snr
    again = NoiseSchedule.from_config(schedule.to_config())
    assert torch.equal(again.table, schedule.table)
    # this table falls below the clamped value before its last entry
    steep = NoiseSchedule.linear(prediction_type=V, zero_snr=True).sigma(torch.arange(1000))
    assert (steep.diff() > 0).all() and steep[-1] == pytest.approx(float(steep[-2]) / 0.9, rel=1e-6)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.prediction_type)
def test_t_and_sigma_are_inverse(schedule: NoiseSchedule) -> None:
    sigma = torch.exp(
        torch.linspace(math.log(schedule.sigma_min), math.log(schedule.sigma_max), 777, dtype=torch.float64)
    )
    t = schedule.timestep(sigma)
    assert t.dtype == torch.float64 and (t.diff() > 0).all()
    torch.testing.assert_close(schedule.sigma(t), sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.timestep(schedule.sigma(t)), t, rtol=1e-9, atol=1e-9)
    assert schedule.timestep(float(sigma[5])).shape == () and schedule.sigma(float(t[5])).shape == ()
    assert schedule.timestep(sigma.reshape(7, 111)).shape == (7, 111)
    torch.testing.assert_close(schedule.log_snr(sigma), torch.log(1 / sigma**2), rtol=1e-12, atol=1e-12)


def test_fractional_t_is_that_of_diffusers() -> None:
    """diffusers' own sigma -> t, linear in ln sigma, for 1000 levels between the entries."""
    schedule, config = TABLES["scaled_linear"]
    oracle = EulerDiscreteScheduler(**config)
    sigma = torch.exp(torch.linspace(math.log(0.03), math.log(14.6), 1000, dtype=torch.float64))
    log_sigmas = schedule.table.numpy()
    expected = [float(oracle._sigma_to_t(np.array(s), log_sigmas).item()) for s in sigma.tolist()]
    np.testing.assert_allclose(schedule.timestep(sigma).numpy(), expected, rtol=0, atol=1e-8)


def test_t_is_clamped_at_the_ends_of_a_table() -> None:
    schedule = NoiseSchedule.linear(prediction_type=V)
    t = schedule.timestep(torch.tensor([0.0, 1e-9, 1e9, math.inf]))
    assert t.tolist() == [0, 0, 999, 999]
    assert schedule.sigma(torch.tensor([-5.0, 2000.0])).tolist() == [schedule.sigma_min, schedule.sigma_max]
    ln_sigma = -0.6 + 1.2 * torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = schedule.timestep(ln_sigma.exp())
    assert t.min() >= 0 and t.max() <= 999 and t.isfinite().all()
    for row in schedule.scaling(ln_sigma.exp()):
        assert row.isfinite().all() and row.shape == ln_sigma.shape


@pytest.mark.parametrize("schedule", KINDS, ids=lambda s: s.prediction_type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_network_gives_back_x0(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    """c_skip x + c_out target = x0 for every noise level, and the target is the textbook's."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    x0, noise = torch.randn(2, 9, 3, 4, 5, generator=generator, dtype=torch.float64).to(dtype).unbind(0)
    target = schedule.target(x0, noise, sigma)
    assert target.dtype == dtype
    _, c_skip, c_out, c_noise = (value.reshape(-1, 1, 1, 1) for value in schedule.scaling(sigma))
    x = x0.double() + sigma.reshape(-1, 1, 1, 1) * noise.double()
    error = c_skip * x + c_out * target.double() - x0.double()
    assert error.abs().max() < (1e-12 if dtype == torch.float64 else 2e-5)
    one = schedule.target(x0[3:4], noise[3:4], float(sigma[3]))
    torch.testing.assert_close(one, target[3:4])
    assert c_noise.flatten().equal(schedule.timestep(sigma))
    s = sigma.reshape(-1, 1, 1, 1)
    alpha, d = 1 / (1 + s**2).sqrt(), schedule.sigma_data
    textbook = {
        "epsilon": noise,
        "sample": x0,
        V: alpha * noise - s * alpha * x0,
        "flow_prediction": noise - x0,
        "edm": (x0 - d**2 / (s**2 + d**2) * x) * (s**2 + d**2).sqrt() / (s * d),
        "edm_v": -(x0 - d**2 / (s**2 + d**2) * x) * (s**2 + d**2).sqrt() / (s * d),
    }[schedule.prediction_type]
    torch.testing.assert_close(
        target.double(), textbook.double(), rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9
    )


def test_edm_scaling_makes_input_and_target_of_unit_variance() -> None:
    schedule = NoiseSchedule.edm(sigma_data=0.5)
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.01, 0.3, 1.0, 40.0):
        x0 = 0.5 * torch.randn(1, 200_000, generator=generator, dtype=torch.float64)
        noise = torch.randn(1, 200_000, generator=generator, dtype=torch.float64)
        scaled = schedule.scaling(sigma).c_in * (x0 + sigma * noise)
        assert scaled.std() == pytest.approx(1, abs=0.01)
        assert schedule.target(x0, noise, sigma).std() == pytest.approx(1, abs=0.01)


def test_any_table() -> None:
    abar = torch.linspace(0.999, 0.001, 37, dtype=torch.float64)
    schedule = NoiseSchedule.from_alphas_cumprod(abar, prediction_type=V)
    torch.testing.assert_close(schedule.sigma(torch.arange(37)), (1 / abar - 1).sqrt(), rtol=1e-10, atol=0)
    config = json.loads(json.dumps(schedule.to_config()))
    assert torch.equal(NoiseSchedule.from_config(config).table, schedule.table)
    oracle = DDIMScheduler.from_config(config)
    torch.testing.assert_close(oracle.alphas_cumprod.double(), abar, rtol=1e-4, atol=1e-7)


def test_configs_of_2022() -> None:
    """Stable Diffusion 1.4's as published: no prediction type, no spacing; and a null."""
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.2.2",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "skip_prk_steps": True,
        "trained_betas": None,
    }
    schedule = NoiseSchedule.from_config(config)
    assert schedule.prediction_type == "epsilon" and schedule.spacing == "leading"
    assert torch.equal(schedule.table, NoiseSchedule.scaled_linear().table)
    assert schedule.to_config() == config
    bare = NoiseSchedule.from_config({"_class_name": "DDPMScheduler"})
    assert torch.equal(bare.table, NoiseSchedule.linear().table)
    assert bare.to_config() == {"_class_name": "DDPMScheduler", "clip_sample": False}
    assert NoiseSchedule.from_config({"_class_name": "LMSDiscreteScheduler"}).spacing == "linspace"
    narrow = NoiseSchedule.from_config({"_class_name": "HeunDiscreteScheduler"})
    assert torch.equal(narrow.table, NoiseSchedule.linear(start=0.00085, end=0.012).table)


def test_round_trip_keeps_what_is_not_mathematics_and_turns_clipping_off() -> None:
    config = {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "prediction_type": V,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "final_sigmas_type": "sigma_min",
    }
    written = NoiseSchedule.from_config(config).to_config()
    assert written == config | {"clip_sample": False}
    written["steps_offset"] = 7
    assert config["steps_offset"] == 1


def test_classes_of_new_schedules() -> None:
    table = NoiseSchedule.scaled_linear(prediction_type=V, zero_snr=True).to_config()
    assert table["_class_name"] == "DDIMScheduler" and table["timestep_spacing"] == "trailing"
    assert (
        table["clip_sample"] is False and table["set_alpha_to_one"] is True and table["rescale_betas_zero_snr"] is True
    )
    flow = NoiseSchedule.flow(shift=3.0).to_config()
    assert flow["_class_name"] == "DPMSolverMultistepScheduler" and flow["use_flow_sigmas"] and flow["flow_shift"] == 3
    assert NoiseSchedule.edm(0.7).to_config()["sigma_data"] == 0.7
    for schedule in ALL:
        again = NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config())))
        sigma = torch.logspace(-2, 1.5, 50)
        for ours, theirs in zip(schedule.scaling(sigma), again.scaling(sigma), strict=True):
            assert torch.equal(ours, theirs)
        assert (again.sigma_min, again.sigma_max, again.spacing) == (
            schedule.sigma_min,
            schedule.sigma_max,
            schedule.spacing,
        )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "VQDiffusionScheduler"}, ["_class_name", "VQDiffusionScheduler", "DDIMScheduler"]),
        ({"_class_name": ["DDIMScheduler"]}, ["_class_name"]),
        ({"prediction_type": "score"}, ["prediction_type", "score", "v_prediction"]),
        ({"prediction_type": "flow_prediction"}, ["prediction_type"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule", "sigmoid", "scaled_linear"]),
        ({"beta_start": "much"}, ["beta_start", "much"]),
        ({"beta_end": 1.5}, ["beta_end", "1.5"]),
        ({"beta_end": math.nan}, ["beta_end", "nan"]),
        ({"num_train_timesteps": 0}, ["num_train_timesteps"]),
        ({"trained_betas": [0.1, 0.2]}, ["trained_betas", "1000"]),
        ({"trained_betas": [0.1, -0.2], "num_train_timesteps": 2}, ["betas"]),
        ({"thresholding": True}, ["thresholding"]),
        ({"variance_type": "learned_range"}, ["variance_type", "learned"]),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            ["prediction_type", "flow_prediction"],
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, ["use_dynamic_shifting"]),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0}, ["sigma_data"]),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 0.001}, ["sigma_max"]),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, ["prediction_type"]),
    ],
)
def test_unsupported_configs(config: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        NoiseSchedule.from_config(config)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)
