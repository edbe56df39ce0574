"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): which passes the network runs, and their sum."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusion_unet.conditioning import Conditioning
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError


@dataclass(frozen=True)
class Guidance:
    """How far to go from the unconditional picture to, and past, the conditional one.

    scale: 1 is the conditional answer alone, and runs no unconditional pass. Raises InputError when it is not finite.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise InputError(f"guidance_scale is {self.scale!r}: a finite number is needed, and 1 is no guidance")

    def needs_both(self, sigma: float) -> bool:
        """Whether the unconditional pass is run at this noise level."""
        return self.scale != 1

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """D_u + scale * (D_c - D_u); linear, so the same for x0 as for the noise."""
        return unconditional + self.scale * (conditional - unconditional)


@dataclass(frozen=True)
class _Pass:
    conditioning: Conditioning | None
    cache: Any


class GuidedDenoiser:
    """(x [B, ...], sigma) -> guided x0, every pass planned and its conditioning joined and precomputed beforehand.

    sigmas are all that it will be asked for. conditional has B rows, or is None for a network without conditioning;
    unconditional has B rows, or is None, which leaves guidance without effect.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance: Guidance,
        sigmas: Sequence[float],
        conditional: Conditioning | None,
        unconditional: Conditioning | None = None,
    ) -> None:
        self._denoiser, self._guidance = denoiser, guidance
        guided = conditional is not None and unconditional is not None
        self._both = {sigma: guided and guidance.needs_both(sigma) for sigma in sigmas}
        self._passes: dict[bool, _Pass] = {}
        for both in set(self._both.values()):
            conditioning = conditional
            if both and conditional is not None and unconditional is not None:
                conditioning = Conditioning.cat([conditional, unconditional])
            levels = [sigma for sigma, needed in self._both.items() if needed == both]
            self._passes[both] = _Pass(conditioning, denoiser.precompute(levels, conditioning))

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        both = self._both[sigma]
        part = self._passes[both]
        if not both:
            return self._denoiser(x, sigma, part.conditioning, cache=part.cache)
        twice = x.repeat(2, *(1,) * (x.ndim - 1))  # both halves in one batch
        return self._guidance.combine(*self._denoiser(twice, sigma, part.conditioning, cache=part.cache).chunk(2))
