"""Solvers of the probability-flow equation as tables of coefficients, and the one loop that runs every table.

The coordinate is x = x0 + sigma * n, in which the equation is dx/dsigma = (x - D(x; sigma)) / sigma with D the denoiser
(Karras et al. 2022, arXiv:2206.00364, eq. 1 and 3). A solver is a function from noise levels to a `Table`, so all that
depends on the levels alone is float64 and known before the first network pass.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule

MAX_STEPS = 10_000
SPACINGS = ("trailing", "leading", "linspace", "karras", "exponential")


@dataclass(frozen=True, eq=False)
class Table:
    """One row a network pass, N in all: x <- x[i] * x + sum_k denoised[i, k] * D_(i-k) + noise[i] * n_i.

    D_i is the denoiser's answer in row i, at the x and the noise level of that row, D_(i-1) that of the row before, and
    n_i fresh N(0, 1) noise. Methods of several passes a step fit too, since what they need of an earlier x is a linear
    combination of the present x and of the answers since then.
    """

    sigma: Tensor  # [N] noise level at which the network is asked
    x: Tensor  # [N]
    denoised: Tensor  # [N, K], the latest answer first; rows before the Kth hold zeros for answers that do not exist
    noise: Tensor  # [N]


Solver = Callable[[Tensor], Table]


def ddim(sigmas: Tensor) -> Table:
    """DDIM (Song et al. 2020, arXiv:2010.02502, eq. 12 with no noise), which is Euler's method in sigma; order 1.

    sigmas: float64 [N + 1], falling, the last 0.
    """
    ratio = sigmas[1:] / sigmas[:-1]
    return Table(sigmas[:-1], ratio, (1 - ratio)[:, None], torch.zeros_like(ratio))


def dpmpp_2m(sigmas: Tensor) -> Table:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2); order 2, with one pass a step.

    sigmas: float64 [N + 1], falling, the last 0. The first step has no answer before it, and the last, to sigma = 0, an
    infinite one in ln sigma: both are of order 1.
    """
    ratio = sigmas[1:] / sigmas[:-1]
    h = -ratio.log()  # step in lambda = -ln sigma
    extrapolate = torch.zeros_like(ratio)
    extrapolate[1:-1] = h[1:-1] / (2 * h[:-2])
    denoised = (1 - ratio)[:, None] * torch.stack([1 + extrapolate, -extrapolate], dim=1)
    return Table(sigmas[:-1], ratio, denoised, torch.zeros_like(ratio))


SOLVERS: dict[str, Solver] = {"dpm++2m": dpmpp_2m, "ddim": ddim}


def run(
    table: Table,
    x: Tensor,
    denoise: Callable[[Tensor, float], Tensor],
    noise: Callable[[int], Tensor],
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Takes x at the first noise level through the table, whichever solver made it; keeps nothing between calls.

    denoise(x, sigma) -> expected x0 of x's shape; noise(draw) -> N(0, 1) of x's shape, where draw is the row's number
    from 1 on (0 is the noise that x began as), asked for only in rows that use it; progress(rows done).
    """
    history: deque[Tensor] = deque(maxlen=table.denoised.shape[1])
    rows = zip(table.sigma.tolist(), table.x.tolist(), table.denoised.tolist(), table.noise.tolist(), strict=True)
    for row, (sigma, of_x, of_denoised, of_noise) in enumerate(rows):
        history.appendleft(denoise(x, sigma))
        x = of_x * x
        for coefficient, denoised in zip(of_denoised, history, strict=False):
            if coefficient:
                x = torch.add(x, denoised, alpha=coefficient)
        if of_noise:
            x = torch.add(x, noise(row + 1), alpha=of_noise)
        if progress is not None:
            progress(row + 1)
    return x


def sigmas(schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Tensor:
    """float64 [steps + 1]: falling noise levels of the steps, and 0 at the end.

    spacing: trailing, leading or linspace place the steps in the timesteps of a table as diffusers does, but do not
    round them (arXiv:2305.08891, table 2); karras (arXiv:2206.00364, eq. 5) and exponential run from sigma_max to
    sigma_min; None is the schedule's own, which for a flow is uniform in s = sigma / (1 + sigma) before the shift.

    Raises InputError for a spacing that is not known or does not fit the schedule, and for steps it cannot be cut into.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps!r}: a whole number of at least 1 is needed")
    if steps > MAX_STEPS:
        raise InputError(f"steps is over {MAX_STEPS}, the most that can be taken")
    spacing = schedule.spacing if spacing is None else spacing
    levels = _levels(schedule, steps, spacing)
    if not (levels.diff() < 0).all():
        limit = schedule.num_train_timesteps
        raise InputError(f"steps is {steps}: {spacing} spacing of {limit} timesteps has room for fewer")
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def _levels(schedule: NoiseSchedule, steps: int, spacing: str) -> Tensor:
    T, k = schedule.num_train_timesteps, torch.arange(steps, dtype=torch.float64)
    high, low = schedule.sigma_max, schedule.sigma_min
    ramp = k / max(steps - 1, 1)  # from 0 to 1
    if spacing == "karras":
        rho = float(schedule.config.get("rho") or 7.0)
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if spacing == "exponential":
        return high * (low / high) ** ramp
    if spacing == "flow" and schedule.spacing == "flow":
        s = (1 - k / steps) * (1 - 1 / T)
        return schedule.shift * s / (1 - s)
    if schedule.table is None or spacing not in SPACINGS:
        known = SPACINGS if schedule.table is not None else ("karras", "exponential")
        raise InputError(f"spacing {spacing!r} is not known for this noise schedule: {', '.join(known)}")
    if spacing == "trailing":
        t = T - 1 - k * T / steps
    elif spacing == "leading":
        t = (steps - 1 - k) * (T // steps)
        t = t + min(int(schedule.config.get("steps_offset") or 0), T - 1 - int(t[0]))  # the last timestep is T - 1
    else:
        t = (T - 1) * (1 - ramp)
    return schedule.sigma(t)
