"""Solvers against the exact solution for a Gaussian mixture, exact moments for a Gaussian, and methods written out."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule
from sampling.levels import sigmas
from sampling.solvers import (
    SOLVERS,
    WITH_ETA,
    Table,
    ancestral,
    ddim,
    dpmpp_2m,
    dpmpp_2m_sde,
    heun,
    lcm,
    run,
    solver_table,
    unipc,
)

Solver = Callable[[Tensor], Table]
ZERO_SNR = NoiseSchedule.scaled_linear(prediction_type="v_prediction", zero_snr=True)
COSINE = NoiseSchedule.cosine(prediction_type="v_prediction", zero_snr=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def no_noise(draw: int) -> Tensor:
    raise AssertionError("a table without noise asked for some")


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


def error_of(solver: Solver, steps: int) -> float:
    high, low = 8.0, 0.1
    levels = high * (low / high) ** (torch.arange(steps + 1, dtype=torch.float64) / steps)
    x = torch.linspace(-15, 15, 41, dtype=torch.float64)
    return float((run(solver(levels), x, mixture_denoiser, no_noise) - exact(x, high, low)).abs().max())


@pytest.mark.parametrize(
    ("solver", "order", "steps"), [(ddim, 1, 80), (dpmpp_2m, 2, 80), (heun, 2, 80), (unipc, 2, 160)]
)
def test_order_of_convergence(solver: Solver, order: int, steps: int) -> None:
    """The greatest error over the line against the exact solution, from sigma 8 to 0.1 in steps even in ln sigma.

    UniPC's falls faster at first, by its corrector, until what its last step leaves, which has none, is all there is.
    """
    errors = [error_of(solver, steps * finer) for finer in (1, 2, 4)]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.25 for slope in slopes), (errors, slopes)


def test_solvers_end_in_the_data() -> None:
    """Down to sigma = 0: the quantile of the data, within what 200 steps leave."""
    levels = torch.cat([8.0 * (0.002 / 8.0) ** torch.linspace(0, 1, 200, dtype=torch.float64), torch.zeros(1).double()])
    x = torch.linspace(-15, 15, 41, dtype=torch.float64)
    for name, tolerance in (("ddim", 0.1), ("euler", 0.1), ("dpm++2m", 0.01), ("heun", 0.01), ("unipc", 0.01)):
        result = run(SOLVERS[name](levels), x, mixture_denoiser, no_noise)
        assert (result - exact(x, 8.0, 1e-9)).abs().max() < tolerance, name


MEAN, SPREAD = 1.5, 0.7


def moments(table: Table, denoise: Callable[[Tensor, float], Tensor]) -> tuple[float, float]:
    """Mean and variance of what a table makes of Gaussian data, exactly: no number is drawn.

    Every step is linear in x, so x is carried as its coefficients on 1, n_0 (the noise it began as), n_1, n_2 ...
    """
    rows = len(table.sigma)
    units = torch.eye(rows + 2, dtype=torch.float64)
    start = MEAN * units[0] + math.sqrt(SPREAD**2 + float(table.sigma[0]) ** 2) * units[1]
    end = run(table, start, denoise, lambda draw: units[1 + draw])
    return float(end[0]), float((end[1:] ** 2).sum())


def gaussian_denoiser(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] for data from N(MEAN, SPREAD^2)."""
    one = torch.zeros_like(x)
    one[0] = 1
    return (SPREAD**2 * x + sigma**2 * MEAN * one) / (SPREAD**2 + sigma**2)


def consistent(x: Tensor, sigma: float) -> Tensor:
    """Where the probability flow from x ends, which a distilled network answers."""
    one = torch.zeros_like(x)
    one[0] = MEAN
    return one + (x - one) * SPREAD / math.sqrt(SPREAD**2 + sigma**2)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (ancestral, 1),
        (partial(ddim, eta=0.5), 1),
        (partial(ddim, eta=1.0), 1),
        (dpmpp_2m_sde, 2),
        (partial(dpmpp_2m, eta=0.5), 2),
    ],
    ids=["ddpm, euler_a", "ddim eta 0.5", "ddim eta 1", "dpm++2m_sde", "dpm++2m_sde eta 0.5"],
)
def test_moments_of_what_is_drawn_with_noise(solver: Solver, order: int) -> None:
    """The mean is the data's in any number of steps; the variance comes to that at sigma = 0.1 with the order."""
    high, low = 20.0, 0.1
    errors = []
    for steps in (100, 200, 400):
        levels = high * (low / high) ** (torch.arange(steps + 1, dtype=torch.float64) / steps)
        mean, variance = moments(solver(levels), gaussian_denoiser)
        assert mean == pytest.approx(MEAN, abs=1e-10)
        errors.append(abs(variance - SPREAD**2 - low**2))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.25 for slope in slopes) and errors[-1] < 0.02, (errors, slopes)


def test_moments_of_lcm() -> None:
    """Of a consistent network, in any number of steps, but for the boundary scalings: 1 - c_out is 1e-3 / t^2."""
    schedule = NoiseSchedule.scaled_linear()
    for steps in (1, 2, 4, 8):
        mean, variance = moments(lcm(sigmas(schedule, steps, "trailing"), schedule), consistent)
        assert mean == pytest.approx(MEAN, rel=1e-5) and variance == pytest.approx(SPREAD**2, rel=1e-4)


def test_a_perfect_denoiser_gives_x0_after_any_number_of_steps() -> None:
    x0 = torch.tensor([0.3, -2.0], dtype=torch.float64)
    schedules = [NoiseSchedule.linear(), ZERO_SNR, NoiseSchedule.flow(shift=3.0), NoiseSchedule.edm()]
    for schedule, name, steps in itertools.product(schedules, set(SOLVERS) - {"lcm"}, (1, 2, 3, 10)):
        levels = sigmas(schedule, steps)
        table = solver_table(name, levels, schedule)
        assert table.sigma.dtype == table.x.dtype == table.denoised.dtype == table.noise.dtype == torch.float64
        assert len(table.sigma) == (2 * steps - 1 if name == "heun" else steps)
        # the coordinate: a row takes x0 + sigma n to x0 + sigma' n, so that its coefficients add up to 1
        torch.testing.assert_close(table.x + table.denoised.sum(1), torch.ones(len(table.sigma)).double())
        result = run(table, x0 + table.sigma[0] * 0.7, lambda x, sigma: x0, lambda draw: torch.ones(2).double())
        torch.testing.assert_close(result, x0, msg=f"{name} {steps}")


@pytest.mark.parametrize("name", list(SOLVERS))
def test_float32_is_enough_at_zero_snr(name: str) -> None:
    """From sigma = 4096 in few steps, where ratios of levels are near 0; Heun's own slope there is 1 / 2 ratio."""
    for schedule, steps in itertools.product((ZERO_SNR, COSINE), (2, 20)):
        table = solver_table(name, sigmas(schedule, steps), schedule)
        draws = torch.randn(2 * steps, 41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = table.sigma[0] * draws[0]
        double = run(table, x, mixture_denoiser, lambda draw, draws=draws: draws[draw])
        single = run(
            table,
            x.float(),
            lambda x, sigma: mixture_denoiser(x.double(), sigma).float(),
            lambda draw, draws=draws: draws[draw].float(),
        )
        assert (single - double).abs().max() < (2e-3 if name == "heun" else 1e-4)


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


def test_one_table_may_be_run_by_many_at_once() -> None:
    """Trajectories that take turns, row by row: the history is the trajectory's, not the table's."""
    table = unipc(sigmas(NoiseSchedule.linear(), 6))
    starts = [torch.linspace(-9, 9, 5).double(), torch.linspace(3, 40, 5).double()]
    steps, xs = [table.begin(), table.begin()], list(starts)
    for row, sigma in enumerate(table.sigma.tolist()):
        xs = [step(row, x, mixture_denoiser(x, sigma), no_noise) for step, x in zip(steps, xs, strict=True)]
    for start, x in zip(starts, xs, strict=True):
        assert torch.equal(x, run(table, start, mixture_denoiser, no_noise))


@pytest.mark.parametrize(
    ("name", "schedule", "eta", "words"),
    [
        ("lcm", NoiseSchedule.flow(), None, "lcm needs a table"),
        ("lcm", NoiseSchedule.edm(), None, "lcm needs a table"),
        ("plms", NoiseSchedule.linear(), None, "'plms' is not known: dpm++2m"),
        ("heun", NoiseSchedule.linear(), 0.5, "heun has no eta: ddim, euler_a, dpm++2m_sde"),
        ("ddim", NoiseSchedule.linear(), -0.1, "eta is -0.1"),
        ("ddim", NoiseSchedule.linear(), 1.5, "eta is 1.5"),
        ("ddim", NoiseSchedule.linear(), float("nan"), "eta is nan"),
        ("ddim", NoiseSchedule.linear(), True, "eta is True"),
    ],
)
def test_bad_solvers(name: str, schedule: NoiseSchedule, eta: float | None, words: str) -> None:
    with pytest.raises(InputError) as error:
        solver_table(name, sigmas(schedule, 4), schedule, eta)
    assert "\n" not in str(error.value) and words in str(error.value)


def test_eta_is_the_solvers_own_unless_given() -> None:
    schedule = NoiseSchedule.linear()
    levels = sigmas(schedule, 5)
    own = {"ddim": 0.0, "euler_a": 1.0, "dpm++2m_sde": 1.0}
    assert set(own) == set(WITH_ETA)
    for name, eta in own.items():
        for column in ("x", "denoised", "noise"):
            given, default = solver_table(name, levels, schedule, eta), solver_table(name, levels, schedule)
            assert torch.equal(getattr(given, column), getattr(default, column))
    assert not solver_table("euler_a", levels, schedule, 0).noise.any()
    assert solver_table("ddim", levels, schedule, 0.5).noise[:-1].all()
