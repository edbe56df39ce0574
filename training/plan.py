"""What each image of the run is: a pure function of (seed, global image index, number of samples).

Image g of the run, counted from 0 over all steps, belongs to optimizer step g // B and to epoch g // N. Everything
drawn for it has an address (`diffusion_unet.random`), so that it does not depend on processes, workers, micro-batches
or on where a run was stopped: the state of the data is one integer, the number of images seen.

Shape letters: B images of a step, N samples of the data set.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffusion_unet.random import Purpose, uniform
from diffusion_unet.random import permutation as random_permutation

GOLDEN = np.uint64(11400714819323198485)  # 2**64 / golden ratio: its multiples fill the circle evenly


@dataclass(frozen=True)
class Draws:
    """What was drawn for some images of the run; [B] each, on the CPU."""

    indices: range  # global image indices
    samples: Tensor  # int64, which sample of the data set
    crop: Tensor  # float64 [B, 2] in [0, 1): place of the crop, down and right
    flip: Tensor  # bool
    caption: Tensor  # float64 in [0, 1): which of the sample's captions
    drop: Tensor  # bool: train with the empty caption
    level: Tensor  # float64 in [0, 1): place in the distribution of noise levels


@dataclass(frozen=True)
class Plan:
    """The plan of a run over `size` samples; `caption_dropout` and the share of flips are probabilities."""

    seed: int
    size: int
    center_crop: bool = False
    random_flip: bool = False
    caption_dropout: float = 0.0
    stratified: bool = True

    def draw(self, indices: range) -> Draws:
        """The draws of these images of the run. Bit-identical however the run is cut into ranges."""

        def u(purpose: Purpose, n: int = 1) -> Tensor:
            return uniform(self.seed, purpose, indices, n)

        crop = torch.full((len(indices), 2), 0.5, dtype=torch.float64) if self.center_crop else u(Purpose.CROP, 2)
        flip = u(Purpose.FLIP)[:, 0] < 0.5 if self.random_flip else torch.zeros(len(indices), dtype=torch.bool)
        return Draws(
            indices=indices,
            samples=torch.tensor([self._sample(index) for index in indices], dtype=torch.int64),
            crop=crop,
            flip=flip,
            caption=u(Purpose.CAPTION)[:, 0],
            drop=u(Purpose.DROP)[:, 0] < self.caption_dropout,
            level=self._even_levels(indices) if self.stratified else u(Purpose.SIGMA)[:, 0],
        )

    def _sample(self, index: int) -> int:
        epoch, place = divmod(index, self.size)
        return int(_permutation(self.seed, epoch, self.size)[place])

    def _even_levels(self, indices: range) -> Tensor:
        """The additive recurrence u + g / golden ratio mod 1: every stretch of images covers [0, 1) evenly."""
        start = np.uint64(int(uniform(self.seed, Purpose.SIGMA, 0, draw=1) * 2.0**53) << 11)
        places = np.asarray(indices, dtype=np.uint64) * GOLDEN + start  # modulo 2**64
        return torch.from_numpy((places >> np.uint64(11)).astype(np.float64) * 2.0**-53)


# A step reaches over the end of an epoch, so the neighbours of the present one are kept.
@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return random_permutation(seed, epoch, size)


def step_indices(step: int, batch_size: int, rank: int = 0, world: int = 1) -> range:
    """The images of optimizer step `step` (from 0) that process `rank` of `world` computes: a run of neighbours."""
    return share(range(step * batch_size, (step + 1) * batch_size), rank, world)


def share(indices: range, part: int, parts: int) -> range:
    """Part `part` of `indices`, cut into `parts` runs of neighbours whose lengths differ by at most 1."""
    cut = [len(indices) * place // parts for place in (part, part + 1)]
    return indices[cut[0] : cut[1]]


def held_out_split(seed: int, size: int, held_out: int) -> tuple[list[int], list[int]]:
    """Samples for training and samples kept from it, both in ascending order; a function of the three numbers only."""
    order = random_permutation(seed, 2**64 - 1, size).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])
