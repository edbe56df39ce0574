"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): which passes the network runs, and their sum.

Shapes: B pictures of a batch. Noise levels are sigma of x = x0 + sigma * n.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError

from .texts import Told


@dataclass(frozen=True)
class Guidance:
    """How far to go from the unconditional picture to, and past, the conditional one, and at which noise levels.

    scale: 1 is the conditional answer alone, and runs no unconditional pass.
    rescale: phi of Lin et al. 2023 (arXiv:2305.08891, section 3.4), from 0, which changes nothing, to 1.
    interval: (low, high), guided where low < sigma <= high and elsewhere as with a scale of 1 (Kynkaanniemi et al.
        2024, arXiv:2404.07724); None leaves a side open.

    Raises InputError, one line, for values that cannot be.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float | None, float | None] = (None, None)

    def __post_init__(self) -> None:
        if not _finite(self.scale):
            raise InputError(f"guidance_scale is {self.scale!r}: a finite number is needed, and 1 is no guidance")
        if not _finite(self.rescale) or not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale is {self.rescale!r}: a number from 0 to 1 is needed, and 0 is none")
        sides = self.interval if isinstance(self.interval, tuple | list) else ()
        if len(sides) != 2 or not all(side is None or (_finite(side) and side >= 0) for side in sides):
            raise InputError(f"interval is {self.interval!r}: two noise levels of at least 0, None for an open side")
        low, high = sides
        if high is not None and high <= (low or 0):
            raise InputError(f"interval is {self.interval!r}, which holds no noise level: the lower one comes first")

    def passes(self, sigma: float) -> int:
        """How many halves the network runs at this noise level: both, or the conditional one alone."""
        low, high = self.interval
        inside = (low is None or low < sigma) and (high is None or sigma <= high)
        return 2 if self.scale != 1 and inside else 1

    def combine(self, conditional: Tensor, unconditional: Tensor, skipped: Tensor | float) -> Tensor:
        """The guided x0 of both halves' [B, ...]: D = D_u + scale (D_c - D_u), rescaled.

        Rescaling is of the network's outputs F = (D - c_skip x) / c_out, as diffusers' `guidance_rescale`, where
        F <- (1 - phi + phi std(F_c) / std(F)) F with a deviation for each picture. c_out cancels in it, so that
        `skipped`, which is c_skip x, is all that is needed of x; without rescaling it is not read.
        """
        guided = unconditional + self.scale * (conditional - unconditional)  # as linear in x0 as it is in F
        if not self.rescale:
            return guided
        output = guided - skipped
        ratio = _deviation(conditional - skipped) / _deviation(output)
        return skipped + (1 + self.rescale * (ratio - 1)) * output


class GuidedDenoiser:
    """(x [B, ...], sigma) -> guided x0, every pass planned and its conditioning joined beforehand.

    sigmas are all that it will be asked for. conditional and unconditional have B rows each; without the second, or for
    a network without conditioning, guidance has no effect.

    passes: {sigma: halves that the network runs there}, 1 or 2, known before it is first run; B rows for each.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance: Guidance,
        sigmas: Sequence[float],
        conditional: Told,
        unconditional: Told | None = None,
    ) -> None:
        self._denoiser, self._guidance = denoiser, guidance
        halves = [conditional] if unconditional is None else [conditional, unconditional]
        guided = all(half.conditioning is not None for half in halves) and len(halves) == 2
        self.passes = {sigma: guidance.passes(sigma) if guided else 1 for sigma in sigmas}
        self._told = {count: Told.cat(halves[:count]) for count in set(self.passes.values())}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        count = self.passes[sigma]
        told = self._told[count]
        if count == 1:
            return self._denoiser(x, sigma, told.conditioning, cache=told.cache)
        # Both halves in one batch, and once what is the same in both: all that comes before the text.
        twice = x if told.same_until_text else x.repeat(2, *(1,) * (x.ndim - 1))
        towards, away = self._denoiser(twice, sigma, told.conditioning, cache=told.cache).chunk(2)
        skipped = float(self._denoiser.schedule.scaling(sigma).c_skip) * x if self._guidance.rescale else 0.0
        return self._guidance.combine(towards, away, skipped)


def _finite(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # a number, which mypy forgets


def _deviation(outputs: Tensor) -> Tensor:
    """The standard deviation of each picture, [B, 1, ...]."""
    return outputs.std(dim=tuple(range(1, outputs.ndim)), keepdim=True)
