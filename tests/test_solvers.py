"""Solvers against diffusers' schedulers and the exact solution for a Gaussian mixture; tables of other kinds."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor

from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule
from sampling.solvers import SOLVERS, Table, ddim, dpmpp_2m, run, sigmas

# numpy's remark on how diffusers' schedulers turn tensors into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
V = "v_prediction"


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


def ours(schedule: NoiseSchedule, levels: Tensor, solver: Callable[[Tensor], Table], toy: Toy, noise: Tensor) -> Tensor:
    start = float(1 / schedule.scaling(levels[0]).c_in)
    return run(solver(levels), start * noise, Denoiser(toy, schedule), no_noise)


def theirs(scheduler: Any, steps: int, toy: Toy, sample: Tensor) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = toy(scheduler.scale_model_input(sample, t), float(t))
        sample = scheduler.step(output, t, sample).prev_sample
    return sample


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


def test_start_is_init_noise_sigma() -> None:
    """Euler's start for leading spacing, sqrt(1 + sigma^2); DDIM's is the same in its own units, n itself."""
    schedule = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"})
    stock = EulerDiscreteScheduler.from_config(schedule.to_config())
    stock.set_timesteps(10)
    level = sigmas(schedule, 10)[0]
    assert float(1 / schedule.scaling(level).c_in) == pytest.approx(float(stock.init_noise_sigma), rel=1e-5)


# ---- exactness ----

MEANS, SPREADS, WEIGHTS = (
    torch.tensor([-1.0, 0.4, 2.0]).double(),
    torch.tensor([0.3, 0.5, 0.2]).double(),
    [0.3, 0.5, 0.2],
)


def mixture_denoiser(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] for data from a mixture of three Gaussians on the line."""
    variance = SPREADS**2 + sigma**2
    log_density = torch.tensor(WEIGHTS).double().log() - (x[:, None] - MEANS) ** 2 / (2 * variance) - variance.log() / 2
    means = (MEANS * sigma**2 + x[:, None] * SPREADS**2) / variance
    return (torch.softmax(log_density, 1) * means).sum(1)


def mixture_cdf(x: Tensor, sigma: float) -> Tensor:
    z = (x[:, None] - MEANS) / (2 * (SPREADS**2 + sigma**2)).sqrt()
    return (torch.tensor(WEIGHTS).double() * (1 + torch.erf(z)) / 2).sum(1)


def exact(x: Tensor, high: float, low: float) -> Tensor:
    """On the line the probability flow keeps every point's quantile: x' = F_low^-1(F_high(x)), by bisection."""
    target = mixture_cdf(x, high)
    left, right = torch.full_like(x, -100), torch.full_like(x, 100)
    for _ in range(100):
        middle = (left + right) / 2
        below = mixture_cdf(middle, low) < target
        left, right = torch.where(below, middle, left), torch.where(below, right, middle)
    return (left + right) / 2


def heun(levels: Tensor) -> Table:
    """Heun's method (Karras et al. 2022, algorithm 1), as rows of one pass each; the step to 0 is Euler's."""
    rows: list[tuple[float, float, list[float]]] = []
    values = levels.tolist()
    for s, after in itertools.pairwise(values):
        ratio = after / s
        rows.append((s, ratio, [1 - ratio, 0.0]))
        if after:
            # x of before the step is (x' - (1 - ratio) D) / ratio; x + h/2 ((x - D) / s + (x' - D') / after)
            of_old, half = 1 + (after - s) / (2 * s), (after - s) / 2
            of_x = of_old / ratio + half / after
            rows.append((after, of_x, [-half / after, -of_old * (1 - ratio) / ratio - half / s]))
    sigma, of_x_column, denoised = zip(*rows, strict=True)
    columns = (torch.tensor(column, dtype=torch.float64) for column in (sigma, of_x_column, denoised))
    return Table(*columns, torch.zeros(len(rows), dtype=torch.float64))


def ancestral(levels: Tensor) -> Table:
    """Euler ancestral (Song et al. 2021, as k-diffusion has it): down to sigma_down, then fresh noise of sigma_up."""
    s, after = levels[:-1], levels[1:]
    up = torch.minimum(after, (after**2 * (s**2 - after**2) / s**2).sqrt())
    down = (after**2 - up**2).clamp_min(0).sqrt()
    return Table(s, down / s, (1 - down / s)[:, None], up)


def error_of(solver: Callable[[Tensor], Table], steps: int) -> float:
    high, low = 8.0, 0.1
    levels = high * (low / high) ** (torch.arange(steps + 1, dtype=torch.float64) / steps)
    x = torch.linspace(-15, 15, 41, dtype=torch.float64)
    return float((run(solver(levels), x, mixture_denoiser, no_noise) - exact(x, high, low)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (dpmpp_2m, 2), (heun, 2)])
def test_order_of_convergence(solver: Callable[[Tensor], Table], order: int) -> None:
    errors = [error_of(solver, steps) for steps in (80, 160, 320)]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.25 for slope in slopes), (errors, slopes)


def test_both_solvers_end_in_the_data() -> None:
    """Down to sigma = 0: the quantile of the data, within what 200 steps leave."""
    levels = torch.cat([8.0 * (0.002 / 8.0) ** torch.linspace(0, 1, 200, dtype=torch.float64), torch.zeros(1).double()])
    x = torch.linspace(-15, 15, 41, dtype=torch.float64)
    assert set(SOLVERS) == {"ddim", "dpm++2m"}
    for name, tolerance in (("ddim", 0.1), ("dpm++2m", 0.01)):
        result = run(SOLVERS[name](levels), x, mixture_denoiser, no_noise)
        assert (result - exact(x, 8.0, 1e-9)).abs().max() < tolerance


def test_a_perfect_denoiser_gives_x0_after_any_number_of_steps() -> None:
    x0 = torch.tensor([0.3, -2.0], dtype=torch.float64)
    for name, solver in SOLVERS.items():
        for steps in (1, 2, 3, 10):
            table = solver(sigmas(NoiseSchedule.linear(), steps))
            assert table.sigma.dtype == table.x.dtype == table.denoised.dtype == torch.float64
            assert len(table.sigma) == steps and not table.noise.any()
            # the coordinate: a row takes x0 + sigma n to x0 + sigma' n, so that its coefficients add up to 1
            torch.testing.assert_close(table.x + table.denoised.sum(1), torch.ones(steps).double())
            result = run(table, x0 + table.sigma[0] * 0.7, lambda x, sigma: x0, no_noise)
            torch.testing.assert_close(result, x0, msg=name)


# ---- other kinds of table in the same loop ----


def test_heun_table_is_heuns_method() -> None:
    levels = sigmas(NoiseSchedule.edm(), 9)
    x = torch.linspace(-100, 100, 33, dtype=torch.float64)
    actual = run(heun(levels), x, mixture_denoiser, no_noise)
    for s, after in itertools.pairwise(levels.tolist()):
        slope = (x - mixture_denoiser(x, s)) / s
        euler = x + (after - s) * slope
        if after:
            slope = (slope + (euler - mixture_denoiser(euler, after)) / after) / 2
        x = x + (after - s) * slope
    torch.testing.assert_close(actual, x, rtol=1e-10, atol=1e-10)


def test_ancestral_table_is_euler_ancestral() -> None:
    levels = sigmas(NoiseSchedule.linear(), 8)
    generator = torch.Generator().manual_seed(4)
    draws = torch.randn(20, 33, generator=generator, dtype=torch.float64)
    x = draws[0] * levels[0]
    asked: list[int] = []

    def noise(draw: int) -> Tensor:
        asked.append(draw)
        return draws[draw]

    actual = run(ancestral(levels), x, mixture_denoiser, noise)
    for i, (s, after) in enumerate(itertools.pairwise(levels.tolist())):
        up = min(after, math.sqrt(after**2 * (s**2 - after**2) / s**2))
        down = math.sqrt(max(after**2 - up**2, 0))
        x = x + (x - mixture_denoiser(x, s)) / s * (down - s)
        x = x + up * draws[i + 1]
    torch.testing.assert_close(actual, x, rtol=1e-9, atol=1e-9)
    assert asked == list(range(1, 8))  # none for the last row, which ends at 0


def test_progress_counts_rows() -> None:
    seen: list[int] = []
    run(ddim(sigmas(NoiseSchedule.linear(), 4)), torch.zeros(1), lambda x, sigma: x, no_noise, seen.append)
    assert seen == [1, 2, 3, 4]


# ---- noise levels ----


def test_levels_are_fractional_and_end_at_zero() -> None:
    schedule = NoiseSchedule.linear()
    for steps in (1, 3, 30, 999, 1000):
        for spacing in ("trailing", "leading", "linspace", "karras", "exponential"):
            levels = sigmas(schedule, steps, spacing)
            assert levels.dtype == torch.float64 and levels.shape == (steps + 1,)
            assert (levels.diff() < 0).all() and levels[-1] == 0
    t = schedule.timestep(sigmas(schedule, 30, "trailing")[:-1])
    torch.testing.assert_close(t, 999 - torch.arange(30).double() * 1000 / 30, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "steps", "spacing", "words"),
    [
        (NoiseSchedule.linear(), 0, None, ["steps is 0"]),
        (NoiseSchedule.linear(), 2.5, None, ["steps is 2.5"]),
        (NoiseSchedule.linear(), True, None, ["steps is True"]),
        (NoiseSchedule.linear(), 1001, "leading", ["steps is 1001", "1000"]),
        (NoiseSchedule.edm(), 10_001, None, ["steps is over 10000"]),
        (NoiseSchedule.linear(), 10, "random", ["'random'", "trailing", "karras"]),
        (NoiseSchedule.linear(), 10, "flow", ["'flow'", "trailing"]),
        (NoiseSchedule.flow(), 10, "trailing", ["'trailing'", "karras"]),
        (NoiseSchedule.edm(), 10, "leading", ["'leading'", "karras"]),
    ],
)
def test_bad_levels(schedule: NoiseSchedule, steps: Any, spacing: str | None, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        sigmas(schedule, steps, spacing)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
