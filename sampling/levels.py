"""Noise levels of the sampling steps: the spacings that a schedule allows, and any list of a user's own.

A list is float64 [N + 1], falling, the last 0. The timestep of a level is `NoiseSchedule.timestep(sigma)`: nothing is
rounded to a whole one.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule

MAX_STEPS = 10_000
MIN_SIGMA, MAX_SIGMA = 1e-9, 1e9  # what float32 can square
SPACINGS = ("trailing", "leading", "linspace", "simple", "karras", "exponential", "beta")
ANYWHERE = ("karras", "exponential", "beta")  # from sigma_max to sigma_min, for which no timesteps are needed


def sigmas(schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Tensor:
    """float64 [steps + 1]: falling noise levels of the steps, and 0 at the end.

    spacing:
        None: the schedule's own, which for a flow is uniform in s = sigma / (1 + sigma) before the shift.
        trailing, leading, linspace: in the timesteps of a table as diffusers places them, but not rounded
            (arXiv:2305.08891, table 2). A1111's "Uniform" and ComfyUI's "normal" are linspace.
        simple: every (T / steps)-th entry of the table from its end, as ComfyUI and A1111 have it. They cut the
            position to a whole one, which makes it differ from `trailing`; between whole positions it does not, so
            here these are two names of one thing. For a flow it is the schedule's own.
        karras (arXiv:2206.00364, eq. 5), exponential: from sigma_max to sigma_min.
        beta: quantiles of Beta(0.6, 0.6) between sigma_max and sigma_min (arXiv:2407.12173), in sigma as diffusers'
            `use_beta_sigmas` and A1111 have it, and in s for a flow. (ComfyUI's are taken in timesteps, and rounded.)

    Raises InputError for a spacing that is not known or does not fit the schedule, and for steps it cannot be cut into.
    """
    check_steps(steps)
    spacing = schedule.spacing if spacing is None else spacing
    levels = _levels(schedule, steps, spacing)
    if not (levels.diff() < 0).all():
        limit = schedule.num_train_timesteps
        raise InputError(f"steps is {steps}: {spacing} spacing of {limit} timesteps has room for fewer")
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def checked_sigmas(values: Sequence[float] | Tensor) -> Tensor:
    """float64 [N + 1]: a user's own noise levels, with 0 at the end where it was left out.

    values: numbers from 1e-9 to 1e9, each below the one before; a 0 may stand at the end.

    Raises InputError that names the first number which cannot be.
    """
    given: list[Any] = values.flatten().tolist() if isinstance(values, Tensor) else list(values)
    numbers: list[float] = []
    for i, value in enumerate(given):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InputError(f"sigmas: {ascii(value)[:80]} is no number")
        number = float(value)
        if not MIN_SIGMA <= number <= MAX_SIGMA and not (number == 0 and 0 < i == len(given) - 1):
            raise InputError(
                f"sigmas: number {i + 1} is {number:g}, outside of {MIN_SIGMA:g} to {MAX_SIGMA:g} (0 ends the list)"
            )
        if i > 0 and not number < numbers[-1]:
            raise InputError(f"sigmas: number {i + 1} is {number:g}, not below the {numbers[-1]:g} before it")
        numbers.append(number)
    if not numbers:
        raise InputError("sigmas is an empty list: give at least one noise level")
    if numbers[-1] != 0:
        numbers.append(0.0)
    if len(numbers) - 1 > MAX_STEPS:
        raise InputError(f"sigmas has over {MAX_STEPS} noise levels, the most that can be taken")
    return torch.tensor(numbers, dtype=torch.float64)


def check_steps(steps: int) -> None:
    """Raises InputError for what cannot be a number of steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps!r}: a whole number of at least 1 is needed")
    if steps > MAX_STEPS:
        raise InputError(f"steps is over {MAX_STEPS}, the most that can be taken")


def _levels(schedule: NoiseSchedule, steps: int, spacing: str) -> Tensor:
    T, k = schedule.num_train_timesteps, torch.arange(steps, dtype=torch.float64)
    high, low = schedule.sigma_max, schedule.sigma_min
    ramp = k / max(steps - 1, 1)  # from 0 to 1
    flow = schedule.spacing == "flow"
    if spacing == "karras":
        rho = float(schedule.config.get("rho") or 7.0)
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if spacing == "exponential":
        return high * (low / high) ** ramp
    if spacing == "beta":
        if not flow:
            return low + beta_quantile(1 - ramp) * (high - low)
        high, low = high / (1 + high), low / (1 + low)
        s = low + beta_quantile(1 - ramp) * (high - low)
        return s / (1 - s)
    if flow and spacing in ("flow", "simple"):
        s = (1 - k / steps) * (1 - 1 / T)
        return schedule.shift * s / (1 - s)
    if schedule.table is None or spacing not in SPACINGS:
        known = SPACINGS if schedule.table is not None else ("simple", *ANYWHERE) if flow else ANYWHERE
        raise InputError(f"spacing {spacing!r} is not known for this noise schedule: {', '.join(known)}")
    if spacing in ("trailing", "simple"):
        t = T - 1 - k * T / steps
    elif spacing == "leading":
        t = (steps - 1 - k) * (T // steps)
        t = t + min(int(schedule.config.get("steps_offset") or 0), T - 1 - int(t[0]))  # the last timestep is T - 1
    else:
        t = (T - 1) * (1 - ramp)
    return schedule.sigma(t)


def beta_quantile(p: Tensor, a: float = 0.6) -> Tensor:
    """x at which the regularised incomplete beta function I_x(a, a) is p; p float64 [N] in [0, 1], 0 < a < 1.

    For x up to 1/2, B(x; a, a) = x^a sum_n (1 - a)_n / n! x^n / (a + n) (DLMF 8.17.7), whose terms halve at least, and
    the whole is B(1; a, a) = 2 B(1/2; a, a). In y = x^a it is convex, so that Newton's method comes down to the root
    from y(1/2) without a step too far. The other half is 1 - x.
    """
    n = torch.arange(1, 60, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    terms = torch.cat([one, ((n - a) / n).cumprod(0)]) / torch.cat([one * a, a + n])
    powers = torch.cat([0 * one, n])

    def integral(y: Tensor) -> Tensor:
        return y * (terms * (y ** (1 / a))[:, None] ** powers).sum(1)

    y = torch.full_like(p, 0.5**a)
    target = 2 * torch.minimum(p, 1 - p) * integral(y)
    for _ in range(20):  # 6 are enough for most
        slope = (1 - y ** (1 / a)) ** (a - 1) / a
        y = (y - (integral(y) - target) / slope).clamp_min(0)
    x = y ** (1 / a)
    return torch.where(p <= 0.5, x, 1 - x)
