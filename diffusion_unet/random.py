"""A random number for every address: (seed, purpose, index, draw), the same for every batch, process and device.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a function from a 64-bit key and
a 128-bit counter to four 32-bit words. Key: the seed. Counter, low word first: block within the address, purpose and
draw, and the two halves of the index.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

__all__ = ["Purpose", "normal", "permutation", "philox", "uniform"]


class Purpose(IntEnum):
    """What a number is drawn for. The values are part of the format: a run that goes on, and a picture that is drawn
    again, depend on them."""

    ORDER = 0
    CAPTION = 1
    DROP = 2
    CROP = 3
    FLIP = 4
    NOISE = 5
    SIGMA = 6
    PICTURE = 7
    BATCH = 8
    TAGS = 9
    MASK = 10


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10. counter uint64 [4, N], each below 2**32, low word first; key (low, high) -> uint64 [4, N]."""
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (product1 >> shift) ^ c1 ^ np.uint64(k0), (product0 >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & low32, product0 & low32
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniform(seed: int, purpose: Purpose, indices: Sequence[int] | int, n: int = 1, draw: int = 0) -> Tensor:
    """float64 [len(indices), n] in [0, 1), multiples of 2**-53. Seed and indices below 2**64, draw below 2**24."""
    words = _words(seed, purpose, indices, math.ceil(n / 2), draw)
    high, low = words[..., 0::2] >> np.uint64(5), words[..., 1::2] >> np.uint64(6)
    return torch.from_numpy((high * 2.0**26 + low) * 2.0**-53)[:, :n]


def normal(seed: int, purpose: Purpose, indices: Sequence[int] | int, shape: Sequence[int], draw: int = 0) -> Tensor:
    """float32 [len(indices), *shape] from N(0, 1), at most 6.7 in magnitude. Arguments as `uniform`."""
    n = math.prod(shape)
    words = _words(seed, purpose, indices, math.ceil(n / 4), draw)
    # Box and Muller 1958; half a step above zero, as the logarithm of 0 has no value
    radius = np.sqrt(-2 * np.log((words[..., 0::2] + 0.5) * 2.0**-32))
    angle = words[..., 1::2] * (2 * math.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).astype(np.float32)
    return torch.from_numpy(pairs).reshape(len(words), words.shape[1])[:, :n].reshape(len(words), *shape)


def permutation(seed: int, epoch: int, n: int, stream: int = 0) -> Tensor:
    """int64 [n]: the order of epoch `epoch` of a stream of n images, every order equally likely."""
    return torch.argsort(uniform(seed, Purpose.ORDER, epoch, n, draw=stream)[0], stable=True)


def _words(seed: int, purpose: Purpose, indices: Sequence[int] | int, blocks: int, draw: int) -> np.ndarray:
    """32-bit words, uint64 [len(indices), 4 * blocks]."""
    if isinstance(indices, int | np.integer):
        indices = [int(indices)]
    for name, value, bits in (("seed", seed, 64), ("draw", draw, 24), *(("index", index, 64) for index in indices)):
        if not 0 <= value < 2**bits:
            raise InputError(f"{name} {value} is out of range: it must be at least 0 and below 2**{bits}")
    index = np.asarray(indices, dtype=np.uint64)
    counter = np.empty((4, len(index), blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = purpose << 24 | draw
    counter[2] = (index & np.uint64(0xFFFFFFFF))[:, None]
    counter[3] = (index >> np.uint64(32))[:, None]
    words = philox(counter.reshape(4, -1), (seed & 0xFFFFFFFF, seed >> 32))
    return words.reshape(4, len(index), blocks).transpose(1, 2, 0).reshape(len(index), 4 * blocks)
