"""What each image of the run is: a pure function of (seed, global image index, batch size, samples of each bucket).

Image g of the run, counted from 0 over all steps, belongs to optimizer step g // B. Everything drawn for it has an
address (`diffusion_unet.random`), so that it does not depend on processes, workers, micro-batches or on where a run
was stopped: the state of the data is one integer, the number of images seen.

Shape letters: B images of a step, N samples of the data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffusion_unet.random import Purpose, uniform
from diffusion_unet.random import permutation as random_permutation

from .buckets import Course

GOLDEN = np.uint64(11400714819323198485)  # 2**64 / golden ratio: its multiples fill the circle evenly
CLASSES = 2**23  # `draw` of the order of images of the class, which no bucket has as its number


@dataclass(frozen=True)
class Draws:
    """What was drawn for some images of the run; [B] each, on the CPU."""

    indices: range  # global image indices
    samples: Tensor  # int64, which sample of the data set
    crop: Tensor  # float64 [B, 2] in [0, 1): place of the crop, down and right
    flip: Tensor  # bool
    caption: Tensor  # float64 in [0, 1): which of the sample's captions
    drop: Tensor  # float64 in [0, 1): below the dropout, the image is trained with the empty caption
    level: Tensor  # float64 in [0, 1): place in the distribution of noise levels


@dataclass(frozen=True)
class Plan:
    """The plan of a run. `members` are the samples of each bucket, `classes` those that every second image is of, for
    prior preservation."""

    seed: int
    batch_size: int
    members: tuple[Sequence[int], ...]
    classes: Sequence[int] = ()
    center_crop: bool = False
    random_flip: bool = False
    stratified: bool = True

    @cached_property
    def _orders(self) -> dict[tuple[int, int], tuple[int, Tensor]]:
        """The order of an epoch of each stream, and that of the epoch before or after it."""
        return {}

    @cached_property
    def course(self) -> Course:
        """Which bucket each optimizer step takes."""
        return Course([len(samples) for samples in self.members], self.batch_size, self.seed)

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
            drop=u(Purpose.DROP)[:, 0],
            level=self._even_levels(indices) if self.stratified else u(Purpose.SIGMA)[:, 0],
        )

    def order(self, index: int, count: int) -> list[int]:
        """An order of `count` things, drawn for image `index` of the run."""
        return torch.argsort(uniform(self.seed, Purpose.TAGS, index, count)[0], stable=True).tolist()

    def _sample(self, index: int) -> int:
        if self.classes:  # images of the instance and of its class take turns
            index, odd = divmod(index, 2)
            return self._of_stream(self.classes, index, CLASSES) if odd else self._of_stream(self.members[0], index, 0)
        step, place = divmod(index, self.batch_size)
        bucket, batch = self.course.at(step)
        return self._of_stream(self.members[bucket], batch * self.batch_size + place, bucket)

    def _of_stream(self, samples: Sequence[int], position: int, stream: int) -> int:
        """Image `position` of an endless stream of all samples, each epoch in an order of its own."""
        epoch, place = divmod(position, len(samples))
        slot = stream, epoch % 2  # a step reaches over the end of an epoch
        if self._orders.get(slot, (-1,))[0] != epoch:
            self._orders[slot] = epoch, random_permutation(self.seed, epoch, len(samples), stream)
        return samples[int(self._orders[slot][1][place])]

    def _even_levels(self, indices: range) -> Tensor:
        """The additive recurrence u + g / golden ratio mod 1: every stretch of images covers [0, 1) evenly."""
        start = np.uint64(int(uniform(self.seed, Purpose.SIGMA, 0, draw=1) * 2.0**53) << 11)
        places = np.asarray(indices, dtype=np.uint64) * GOLDEN + start  # modulo 2**64
        return torch.from_numpy((places >> np.uint64(11)).astype(np.float64) * 2.0**-53)


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
