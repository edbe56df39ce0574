"""Where a picture's noise comes from: draws 0, 1, 2 ... of its seed, the same for every batch size and device.

Draw 0 is the noise that the picture begins as, those after it are what a stochastic solver adds. Shapes: C H W in the
network's space.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_unet.errors import InputError
from diffusion_unet.random import Purpose, normal, philox

Shape = tuple[int, int, int]
Noise = Callable[[int], Tensor]  # draw -> float32 [C, H, W] from N(0, 1), on the CPU


def noise_of(
    seed: int,
    shape: Shape,
    rng: str = "philox",
    *,
    variation_seed: int | None = None,
    variation_strength: float = 0.0,
) -> Noise:
    """The draws of one picture, in any order; each depends on these arguments and the draw's number alone.

    Args:
        seed, variation_seed: whole numbers from 0 to 2**64 - 1. Of these, torch takes the lower 32 bits alone.
        rng: philox is the project's own, a number for every address. torch is `torch.randn` on the CPU, with which
            diffusers and ComfyUI begin. nv is `torch.randn` on a GPU of NVIDIA, as A1111's setting "RNG: NV" has it.
        variation_strength: from 0, the seed's own draw 0, to 1, that of variation_seed; between the two their
            spherical interpolation. Later draws are the seed's own.

    Raises InputError.
    """
    if rng not in SOURCES:
        raise InputError(f"rng {rng!r} is not known: {', '.join(SOURCES)}")
    source = SOURCES[rng]
    own = source(checked_seed(seed), shape)
    strength = variation_strength
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise InputError(f"variation_strength is {strength!r}: a number from 0 (the seed) to 1 (the other) is needed")
    if variation_seed is None:
        if strength:
            raise InputError(f"variation_strength is {strength}, and there is no variation_seed to go to: give one")
        return own
    other = source(checked_seed(variation_seed, "variation_seed"), shape)
    if strength == 0:
        return own

    def noise(draw: int) -> Tensor:
        if draw:
            return own(draw)
        return other(0) if strength == 1 else slerp(own(0), other(0), float(strength))

    return noise


def checked_seed(seed: Any, name: str = "seed") -> int:
    """Raises InputError unless it is a whole number from 0 to 2**64 - 1."""
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**64:
        raise InputError(f"{name} {seed!r} cannot be: whole numbers from 0 to 2**64 - 1")
    return int(seed)


def strengths(n: int) -> list[float]:
    """variation_strength of each of n pictures in a row, evenly from the seed's own to that of the other seed."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise InputError(f"a row of {n!r} pictures cannot be: two are its ends")
    return [k / (n - 1) for k in range(n)]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """float32: the point at t of the way from a to b, along the arc between them (Shoemake 1985, section 3.3).

    Both are one vector each, over all their elements. Where they have the same direction, or the opposite one, no arc
    is the shortest or it has no length, and the way is straight.
    """
    # numpy, as the order in which torch sums depends on the number of its threads
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    cosine = np.sum(x * y) / math.sqrt(np.sum(x * x) * np.sum(y * y))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-6:
        of_x, of_y = 1 - t, t
    else:
        of_x, of_y = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return torch.from_numpy((of_x * x + of_y * y).astype(np.float32))


# --- sources


def _philox(seed: int, shape: Shape) -> Noise:
    return lambda draw: normal(seed, Purpose.PICTURE, 0, shape, draw)[0]


class _Torch:
    """A generator gives its numbers in order: a draw before the last one that was asked for begins anew."""

    def __init__(self, seed: int, shape: Shape) -> None:
        self._seed, self._shape = seed, (1, *shape)
        self._begin()

    def _begin(self) -> None:
        self._generator, self._drawn = torch.Generator("cpu").manual_seed(self._seed), 0

    def __call__(self, draw: int) -> Tensor:
        if draw < self._drawn:
            self._begin()
        for _ in range(self._drawn, draw):
            self._next()
        return self._next()

    def _next(self) -> Tensor:
        self._drawn += 1
        return torch.randn(self._shape, generator=self._generator, dtype=torch.float32)[0]


def _nv(seed: int, shape: Shape) -> Noise:
    """Philox 4x32-10 keyed with the seed, as curand has it: a subsequence for each element, a block for each draw."""
    n = math.prod(shape)
    # of float32, as curand's CURAND_2POW32_INV_2PI; the rest in float64, as A1111 computes it
    turn = float(np.float32(2 * math.pi)) * 2.0**-32

    def noise(draw: int) -> Tensor:
        counter = np.zeros((4, n), dtype=np.uint64)
        counter[0], counter[2] = draw, np.arange(n, dtype=np.uint64)
        x, y, _, _ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
        u, v = x * 2.0**-32 + 2.0**-33, y * turn + turn / 2
        values = np.sqrt(-2 * np.log(u)) * np.sin(v)  # the first of the two of Box and Muller 1958
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)

    return noise


SOURCES: dict[str, Callable[[int, Shape], Noise]] = {"philox": _philox, "torch": _Torch, "nv": _nv}
RNGS: Sequence[str] = tuple(SOURCES)
