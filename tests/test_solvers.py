"""Solvers against diffusers' schedulers, on the same network, levels and noise."""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffusion_unet.denoiser import Denoiser
from diffusion_unet.schedule import NoiseSchedule
from sampling.levels import sigmas
from sampling.solvers import (
    SOLVERS,
    Table,
    ddim,
    dpmpp_2m,
    dpmpp_2m_sde,
    heun,
    lcm,
    run,
    unipc,
)

# numpy's remark on how diffusers' schedulers turn tensors into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
V = "v_prediction"
Solver = Callable[[Tensor], Table]


class Toy(torch.nn.Module):
    """A smooth function of its input and timestep."""

    def forward(self, x: Tensor, timestep: float | Tensor, context: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return torch.tanh(x.roll(1, -1) + torch.sin(t / 300)) - 0.3 * x


class Timeless(Toy):
    """diffusers cuts a flow's timesteps to whole numbers."""

    def forward(self, x: Tensor, timestep: float | Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x, 0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def no_noise(draw: int) -> Tensor:
    raise AssertionError("a table without noise asked for some")


def fresh(draw: int) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(100 + draw))


def ours(
    schedule: NoiseSchedule,
    levels: Tensor,
    solver: Solver,
    toy: Toy,
    noise: Tensor,
    draws: Callable[[int], Tensor] = no_noise,
) -> Tensor:
    start = float(1 / schedule.scaling(levels[0]).c_in)
    return run(solver(levels), start * noise, Denoiser(toy, schedule), draws)


def theirs(scheduler: Any, steps: int, toy: Toy, sample: Tensor, **options: Any) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = toy(scheduler.scale_model_input(sample, t), float(t))
        sample = scheduler.step(output, t, sample, **options).prev_sample
    return sample


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Lets a scheduler draw 1, 2, 3 ... of `fresh`."""

    def patch(scheduler: Any) -> None:
        draws = itertools.count(1)
        module = sys.modules[type(scheduler).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: fresh(next(draws)))

    return patch


def agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To a fraction of the picture's standard deviation."""
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() < tolerance * max(1.0, float(expected.std()))


NOISE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
MODELS = [
    NoiseSchedule.scaled_linear(),
    NoiseSchedule.linear(prediction_type="sample"),
    NoiseSchedule.linear(prediction_type=V),
    NoiseSchedule.scaled_linear(prediction_type=V, zero_snr=True),
]


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize(
    ("schedule", "spacing", "offset"),
    [
        *((schedule, "leading", offset) for schedule in MODELS for offset in (0, 1)),
        # not for zero SNR: the first step is then the clamped one, and DDIM does not clamp
        *((schedule, "trailing", 0) for schedule in MODELS if not schedule.zero_snr),
    ],
)
def test_ddim_is_that_of_diffusers(schedule: NoiseSchedule, steps: int, spacing: str, offset: int) -> None:
    config = schedule.to_config() | {"timestep_spacing": spacing, "steps_offset": offset}
    own = NoiseSchedule.from_config(config)
    expected = theirs(DDIMScheduler.from_config(config), steps, Toy(), NOISE)
    actual = ours(own, sigmas(own, steps), ddim, Toy(), NOISE)
    scale = max(1.0, float(expected.abs().max()))
    assert (actual - expected).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 25])
@pytest.mark.parametrize("schedule", MODELS, ids=lambda s: f"{s.prediction_type} {s.zero_snr}")
def test_dpmpp_2m_is_that_of_diffusers(schedule: NoiseSchedule, steps: int) -> None:
    config = schedule.to_config()
    keys = set(DPMSolverMultistepScheduler().config)
    stock = DPMSolverMultistepScheduler.from_config({key: value for key, value in config.items() if key in keys})
    expected = theirs(stock, steps, Toy(), NOISE)
    actual = ours(schedule, sigmas(schedule, steps), dpmpp_2m, Toy(), NOISE)
    assert (actual - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_flow_with_dpmpp_2m_is_that_of_diffusers(steps: int, shift: float) -> None:
    schedule = NoiseSchedule.flow(shift=shift)
    stock = DPMSolverMultistepScheduler.from_config(schedule.to_config())
    levels = sigmas(schedule, steps)
    expected = theirs(stock, steps, Timeless(), NOISE)
    torch.testing.assert_close((levels / (1 + levels)).float(), stock.sigmas, rtol=1e-5, atol=1e-7)
    actual = ours(schedule, levels, dpmpp_2m, Timeless(), NOISE)
    assert (actual - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_edm_with_euler_is_that_of_diffusers(kind: str) -> None:
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "sigma_schedule": kind, "rho": 5.0}
    schedule = NoiseSchedule.from_config(config)
    levels = sigmas(schedule, 12)
    start = NOISE * float(1 / schedule.scaling(levels[0]).c_in)
    expected = theirs(EDMEulerScheduler.from_config(config), 12, Toy(), start)
    assert (ours(schedule, levels, ddim, Toy(), NOISE) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("steps", "spacing"),
    [
        (28, {"timestep_spacing": "linspace"}),  # whole timesteps, 999 / 27
        (20, {"timestep_spacing": "trailing"}),
        (20, {"timestep_spacing": "leading", "steps_offset": 1}),
        (13, {"use_karras_sigmas": True}),
        (13, {"use_exponential_sigmas": True}),
    ],
)
def test_euler_is_ddim_on_every_spacing(steps: int, spacing: dict[str, Any]) -> None:
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": V,
        **spacing,
    }
    schedule = NoiseSchedule.from_config(config)
    stock = EulerDiscreteScheduler.from_config(config)
    levels = sigmas(schedule, steps)
    start = NOISE * float(1 / schedule.scaling(levels[0]).c_in)
    expected = theirs(stock, steps, Toy(), start)
    torch.testing.assert_close(levels.float(), stock.sigmas, rtol=5e-5, atol=0)
    assert (ours(schedule, levels, ddim, Toy(), NOISE) - expected).abs().max() < 1e-5


def stock_of(kind: Any, schedule: NoiseSchedule, **extra: Any) -> Any:
    known = set(kind().config)
    return kind.from_config({key: value for key, value in schedule.to_config().items() if key in known} | extra)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 25])
@pytest.mark.parametrize("schedule", MODELS, ids=lambda s: f"{s.prediction_type} {s.zero_snr}")
def test_unipc_is_that_of_diffusers(schedule: NoiseSchedule, steps: int) -> None:
    expected = theirs(stock_of(UniPCMultistepScheduler, schedule), steps, Toy(), NOISE)
    agree(ours(schedule, sigmas(schedule, steps), unipc, Toy(), NOISE), expected)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_flow_with_unipc_is_that_of_diffusers(steps: int) -> None:
    """Its levels are given to ours: they start at s = 1 - 1e-6, and ours at 1 - 1/T."""
    schedule = NoiseSchedule.flow(shift=3.0)
    stock = stock_of(UniPCMultistepScheduler, schedule)
    expected = theirs(stock, steps, Timeless(), NOISE)
    s = stock.sigmas.double()
    agree(ours(schedule, s / (1 - s), unipc, Timeless(), NOISE), expected)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("schedule", MODELS[:3], ids=lambda s: s.prediction_type)
def test_heun_is_that_of_diffusers(schedule: NoiseSchedule, steps: int) -> None:
    """In fewer steps its float32 shows, x + (x - D) / s * (t - s) at s = 157, which is a sum here."""
    levels = sigmas(schedule, steps)
    stock = stock_of(HeunDiscreteScheduler, schedule)
    expected = theirs(stock, steps, Toy(), NOISE * float(1 / schedule.scaling(levels[0]).c_in))
    assert len(stock.timesteps) == len(heun(levels).sigma) == 2 * steps - 1  # it counts steps as here
    agree(ours(schedule, levels, heun, Toy(), NOISE), expected)


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("schedule", MODELS[:3], ids=lambda s: s.prediction_type)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_is_that_of_diffusers(
    schedule: NoiseSchedule, steps: int, eta: float, same_noise: Callable[[Any], None]
) -> None:
    stock = stock_of(DDIMScheduler, schedule)
    same_noise(stock)
    expected = theirs(stock, steps, Toy(), NOISE, eta=eta)
    agree(ours(schedule, sigmas(schedule, steps), partial(ddim, eta=eta), Toy(), NOISE, fresh), expected)


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
@pytest.mark.parametrize("schedule", MODELS[:3], ids=lambda s: s.prediction_type)
def test_ddpm_is_that_of_diffusers(schedule: NoiseSchedule, steps: int, same_noise: Callable[[Any], None]) -> None:
    stock = stock_of(DDPMScheduler, schedule, variance_type="fixed_small")
    same_noise(stock)
    expected = theirs(stock, steps, Toy(), NOISE)
    agree(ours(schedule, sigmas(schedule, steps), SOLVERS["ddpm"], Toy(), NOISE, fresh), expected)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    "schedule", [MODELS[0], MODELS[2], MODELS[3]], ids=lambda s: f"{s.prediction_type} {s.zero_snr}"
)
def test_euler_a_is_that_of_diffusers(schedule: NoiseSchedule, steps: int, same_noise: Callable[[Any], None]) -> None:
    """It finds sigma_down as a difference of squares in float32, which a zero-SNR table's first step feels."""
    levels = sigmas(schedule, steps)
    stock = stock_of(EulerAncestralDiscreteScheduler, schedule)
    same_noise(stock)
    expected = theirs(stock, steps, Toy(), NOISE * float(1 / schedule.scaling(levels[0]).c_in))
    actual = ours(schedule, levels, SOLVERS["euler_a"], Toy(), NOISE, fresh)
    agree(actual, expected, 5e-5 if schedule.zero_snr else 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("schedule", MODELS, ids=lambda s: f"{s.prediction_type} {s.zero_snr}")
def test_dpmpp_2m_sde_is_that_of_diffusers(
    schedule: NoiseSchedule, steps: int, same_noise: Callable[[Any], None]
) -> None:
    stock = stock_of(DPMSolverMultistepScheduler, schedule, algorithm_type="sde-dpmsolver++")
    same_noise(stock)
    expected = theirs(stock, steps, Toy(), NOISE)
    agree(ours(schedule, sigmas(schedule, steps), dpmpp_2m_sde, Toy(), NOISE, fresh), expected)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("schedule", MODELS[:3], ids=lambda s: s.prediction_type)
def test_lcm_is_that_of_diffusers(schedule: NoiseSchedule, steps: int, same_noise: Callable[[Any], None]) -> None:
    """Whose timesteps are `trailing` where steps divide the 50 that it picks from; others it cuts to one of these."""
    stock = stock_of(LCMScheduler, schedule)
    same_noise(stock)
    expected = theirs(stock, steps, Toy(), NOISE)
    levels = sigmas(schedule, steps, "trailing")
    torch.testing.assert_close(schedule.timestep(levels[:-1]), stock.timesteps.double(), rtol=1e-9, atol=1e-6)
    agree(ours(schedule, levels, partial(lcm, schedule=schedule), Toy(), NOISE, fresh), expected)


def test_start_is_init_noise_sigma() -> None:
    """Euler's start for leading spacing, sqrt(1 + sigma^2); DDIM's is the same in its own units, n itself."""
    schedule = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"})
    stock = EulerDiscreteScheduler.from_config(schedule.to_config())
    stock.set_timesteps(10)
    level = sigmas(schedule, 10)[0]
    assert float(1 / schedule.scaling(level).c_in) == pytest.approx(float(stock.init_noise_sigma), rel=1e-5)
