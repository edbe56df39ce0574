"""Solvers as tables of coefficients, and the one loop that runs every table and every wrapped scheduler.

The coordinate is x = x0 + sigma * n, in which the probability flow is dx/dsigma = (x - D(x; sigma)) / sigma with D the
denoiser (Karras et al. 2022, arXiv:2206.00364, eq. 1 and 3). A solver is a function from noise levels to a `Table`, so
all that depends on the levels alone is float64 and known before the first network pass.

In all of them: sigmas is float64 [N + 1], falling, the last 0; s is the level that a step starts at, t the next one,
r = t / s, and h = -ln r the step in lambda = -ln sigma.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule

Noise = Callable[[int], Tensor]  # draw -> N(0, 1) of x's shape
Step = Callable[[int, Tensor, Tensor, Noise], Tensor]  # row, x, denoised, noise -> the next x


class Course(Protocol):
    """What `run` takes: the levels at which the network is asked, and a trajectory's steps from one to the next."""

    @property
    def sigma(self) -> Tensor:
        """float64 [rows]."""

    def begin(self) -> Step:
        """What keeps the history of one trajectory, and of no other; called for the rows in turn."""


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

    def begin(self) -> Step:
        history: deque[Tensor] = deque(maxlen=self.denoised.shape[1])
        rows = list(zip(self.x.tolist(), self.denoised.tolist(), self.noise.tolist(), strict=True))

        def step(row: int, x: Tensor, denoised: Tensor, noise: Noise) -> Tensor:
            of_x, of_denoised, of_noise = rows[row]
            history.appendleft(denoised)
            x = x if of_x == 1 else of_x * x
            for coefficient, answer in zip(of_denoised, history, strict=False):
                if coefficient:
                    x = torch.add(x, answer, alpha=coefficient)
            return torch.add(x, noise(row + 1), alpha=of_noise) if of_noise else x

        return step


def run(
    course: Course,
    x: Tensor,
    denoise: Callable[[Tensor, float], Tensor],
    noise: Noise,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Takes x at the first noise level through the course, whichever solver made it; keeps nothing between calls.

    denoise(x, sigma) -> expected x0 of x's shape; noise(draw) -> N(0, 1) of x's shape, where draw is the row's number
    from 1 on (0 is the noise that x began as), asked for only in rows that use it; progress(rows done).
    """
    step = course.begin()
    for row, sigma in enumerate(course.sigma.tolist()):
        x = step(row, x, denoise(x, sigma), noise)
        if progress is not None:
            progress(row + 1)
    return x


def ddim(sigmas: Tensor, eta: float = 0.0) -> Table:
    """DDIM (Song et al. 2020, arXiv:2010.02502, eq. 12 and 16); order 1.

    eta: 0 is Euler's method in sigma, so `euler` is this too; 1 is `ancestral`.
    """
    s, t = sigmas[:-1], sigmas[1:]
    r = t / s
    up2 = eta**2 * (1 - r) * (1 + r)  # (noise that is put in anew / t)^2
    down = r * (1 - up2).sqrt()
    return Table(s, down, (1 - down)[:, None], t * up2.sqrt())


def ancestral(sigmas: Tensor) -> Table:
    """DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7): a draw from q(x_t | x_s, x0 = D), the lesser variance.

    In sigma the posterior is N(r^2 x + (1 - r^2) D, t^2 (1 - r^2)). That is DDIM with eta = 1, k-diffusion's Euler
    ancestral and the SDE-DPM-Solver++ of order 1 as well: `ddpm` and `euler_a` are one arithmetic.
    """
    return ddim(sigmas, eta=1.0)


def heun(sigmas: Tensor) -> Table:
    """Heun's method (Karras et al. 2022, algorithm 1); order 2.

    A step is two network passes but for the last, Euler's to 0: N steps have 2 N - 1 rows. diffusers and A1111 count
    steps in the same way.
    """
    s, t = sigmas[:-1], sigmas[1:]
    r = t / s
    # x' is Euler's x at t and D' the answer there. The trapezoid x + (t - s) / 2 ((x - D) / s + (x' - D') / t) is
    # x' + (s - t) / 2t (D' - D), as (x - D) / s = (x' - D) / t: no earlier x, and no division by a small ratio.
    euler = torch.stack([r, 1 - r, torch.zeros_like(r)], dim=1)
    half = (s - t) / (2 * t)
    mean = torch.stack([torch.ones_like(r), half, -half], dim=1)
    rows = torch.stack([euler, mean], dim=1).flatten(0, 1)[:-1]
    return Table(torch.stack([s, t], dim=1).flatten()[:-1], rows[:, 0], rows[:, 1:], torch.zeros(len(rows)).double())


def dpmpp_2m(sigmas: Tensor, eta: float = 0.0) -> Table:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2); order 2, with one pass a step.

    The first step has no answer before it, and the last, to sigma = 0, an infinite one in lambda: both are of order 1.

    eta: above 0 the SDE variant of the midpoint kind, as k-diffusion has it (1 in the paper, its appendix B).
    """
    s, t = sigmas[:-1], sigmas[1:]
    r = t / s
    kept = r ** (1 + eta)
    extrapolate = _extrapolation(r)
    denoised = (1 - kept)[:, None] * torch.stack([1 + extrapolate, -extrapolate], dim=1)
    return Table(s, kept, denoised, t * (1 - r ** (2 * eta)).sqrt())


def dpmpp_2m_sde(sigmas: Tensor, eta: float = 1.0) -> Table:
    """DPM-Solver++ 2M SDE: `dpmpp_2m` with fresh noise in every step but the last."""
    return dpmpp_2m(sigmas, eta)


def unipc(sigmas: Tensor) -> Table:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2) in x0, B(h) = e^h - 1, order 2 with a corrector.

    Its predictor is a step of DPM-Solver++ 2M; once the network has answered at x, the corrector moves that x, and the
    predictor goes on from there: the two are one row. The last step is of order 1 and has no corrector, as in
    diffusers, so that the end of the course is of order 2.
    """
    s, r = sigmas[:-1], sigmas[1:] / sigmas[:-1]
    extrapolate = _extrapolation(r)
    # Both start from the same x, which therefore leaves corrected - predicted: an expression in the answers alone.
    latest, earlier = (torch.zeros_like(r) for _ in range(2))
    if len(r) > 1:
        latest[1] = (1 - r[0]) / 2  # after a step of order 1 (eq. 9 with p = 1)
    if len(r) > 2:
        q, h = r[1:-1], -r[1:-1].log()
        growth = 2 * extrapolate[1:-1]  # h over the h before
        first = 1 / (1 - q) - 1 / h  # phi_1 and phi_2 of eq. 9, over B(h)
        second = (1 - 2 / h) / (1 - q) + 2 / h**2
        weight = (first - second) * growth / (1 + growth)  # of D_(i-2), the other is that of D_i
        latest[2:] = (1 - q) * (first - weight)
        earlier[2:] = (1 - q) * (weight - 0.5) * growth
    corrector = torch.stack([latest, earlier - latest, -earlier], dim=1)
    predictor = (1 - r)[:, None] * torch.stack([1 + extrapolate, -extrapolate, torch.zeros_like(r)], dim=1)
    return Table(s, r, r[:, None] * corrector + predictor, torch.zeros_like(r))


def lcm(sigmas: Tensor, schedule: NoiseSchedule) -> Table:
    """Latent consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3): x0 of each step, noised anew.

    x0 = c_skip x_vp + c_out D with the paper's boundary scalings of the timestep: sigma_data 0.5, timesteps times 10.
    For a network distilled for it; the timesteps it was distilled at are `trailing`. Raises InputError for a schedule
    without a table of timesteps.
    """
    if schedule.table is None:
        raise InputError("solver lcm needs a table of timesteps, which a flow and EDM have not: try euler_a")
    s, t = sigmas[:-1], sigmas[1:]
    scaled = 10.0 * schedule.timestep(s)
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    return Table(s, c_skip / (1 + s**2).sqrt(), c_out[:, None], t)


def _extrapolation(r: Tensor) -> Tensor:
    """h_i / 2 h_(i-1), the weight of D_i - D_(i-1) half a step ahead; 0 in the first and the last step."""
    h = -r.log()
    result = torch.zeros_like(r)
    result[1:-1] = h[1:-1] / (2 * h[:-2])
    return result


SOLVERS: dict[str, Callable[..., Table]] = {
    "dpm++2m": dpmpp_2m,
    "dpm++2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "ddim": ddim,
    "euler": ddim,
    "euler_a": ancestral,
    "heun": heun,
    "lcm": lcm,
    "ddpm": ancestral,
}
WITH_ETA: dict[str, Callable[[Tensor, float], Table]] = {"ddim": ddim, "euler_a": ddim, "dpm++2m_sde": dpmpp_2m_sde}


def solver_table(solver: str, sigmas: Tensor, schedule: NoiseSchedule, eta: float | None = None) -> Table:
    """The table of a solver, by its name in `SOLVERS`.

    eta: how much of the noise is put in anew, from 0 (none) to 1; None is the solver's own. Raises InputError for a
    name that is not known, an eta out of range or with a solver that has none, and a schedule that does not fit.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver {ascii(solver)[:80]} is not known: {', '.join(SOLVERS)}")
    if eta is None:
        return lcm(sigmas, schedule) if solver == "lcm" else SOLVERS[solver](sigmas)
    if solver not in WITH_ETA:
        raise InputError(f"solver {solver} has no eta: {', '.join(WITH_ETA)} have")
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise InputError(f"eta is {eta!r}: a number from 0 to 1 is needed")
    return WITH_ETA[solver](sigmas, float(eta))
