"""Sizes to train at that share one pixel budget, and which of them each optimizer step takes.

Images are resized to cover the bucket nearest to their aspect ratio, and little of them is cropped away. A global batch
comes from one bucket. All here is a pure function of sizes, counts and the seed: ranks, workers and the place where a
run was stopped change nothing.

Shape letters: H W the sides of a bucket in pixels, N_b images in bucket b, B images of an optimizer step.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion_unet.errors import InputError
from diffusion_unet.random import Purpose, uniform

MAX_ASPECT = 16  # of what is kept of an image; a strip that is longer loses its ends


def bucket_sizes(resolution: int, step: int, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """(H, W) of every bucket, in ascending order.

    Both sides are multiples of `step`, H * W is at most resolution**2, neither side could be a step longer, and the
    longer side is at most `max_aspect` times the shorter. Raises InputError where the square is none of them.
    """
    if step < 1 or resolution < step or resolution % step:
        raise InputError(f"data.resolution: {resolution} is no multiple of data.bucket_step, {step}")
    if not (math.isfinite(max_aspect) and max_aspect >= 1):
        raise InputError(f"data.max_aspect: {max_aspect} cannot be, the longer side over the shorter is 1 or more")
    budget = (resolution // step) ** 2  # in squares of step x step
    sizes = []
    for height in range(1, math.isqrt(int(budget * max_aspect)) + 1):
        width = budget // height
        longest = budget // width == height  # else a greater height has the same width
        if longest and max(height, width) <= max_aspect * min(height, width):
            sizes.append((height * step, width * step))
    return sizes


def assign(sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]]) -> list[int]:
    """The index of the bucket (H, W) for each image (W, H): the nearest in the logarithm of the aspect ratio, and of
    equally near ones the largest, then the first."""

    widths, heights = np.array(sizes, dtype=np.int64).reshape(-1, 2).T  # [N] each
    chosen, best = np.zeros(len(sizes), dtype=np.int64), np.full(len(sizes), np.inf)
    for bucket in sorted(range(len(buckets)), key=lambda bucket: -math.prod(buckets[bucket])):
        height, width = buckets[bucket]
        # A ratio of integers is rounded once, and so is the same on every machine; a logarithm may not be.
        across, down = widths * height, heights * width
        distance = np.maximum(across, down) / np.minimum(across, down)
        nearer = distance < best
        chosen[nearer], best[nearer] = bucket, distance[nearer]
    return chosen.tolist()


def cover(image: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """(H, W) to resize an image (W, H) to before a bucket (H, W) is cropped from it.

    The smallest size of the image's aspect ratio that covers the bucket, rounded to whole pixels. Its longer side is at
    most MAX_ASPECT times the bucket's other one: an image that is longer than that loses its ends.
    """
    (image_width, image_height), (height, width) = image, bucket
    scale = max(height / image_height, width / image_width)
    return (
        max(height, min(round(image_height * scale), MAX_ASPECT * width)),
        max(width, min(round(image_width * scale), MAX_ASPECT * height)),
    )


class Fill(NamedTuple):
    """How a data set fills its buckets."""

    batches: list[float]  # of each bucket in one epoch, N_b / B
    small: list[int]  # buckets that have images, but fewer than one batch


def fill(populations: Sequence[int], batch_size: int) -> Fill:
    """The fill of buckets of `populations` images. A small bucket is trained on all the same: its batch comes up once
    in several epochs, and holds images more than once."""
    return Fill(
        [population / batch_size for population in populations],
        [bucket for bucket, population in enumerate(populations) if 0 < population < batch_size],
    )


class Course:
    """Which bucket each optimizer step takes.

    A bucket is an endless stream: its N_b images in the order of one epoch, then in that of the next, and so on, cut
    into batches of B. In epoch e of the run bucket b has floor((e + 1) N_b / B) - floor(e N_b / B) batches: what does
    not fill a batch is carried into the next epoch. The batches of an epoch come in an order that is drawn for it,
    those of one bucket among them in the order of its stream. Nothing is dropped or repeated, and any step is found
    without those before it. Where there is one bucket, step s takes its batch s.

    Raises InputError where there are no images.
    """

    def __init__(self, populations: Sequence[int], batch_size: int, seed: int):
        if batch_size < 1 or min(populations, default=-1) < 0 or sum(populations) == 0:
            raise InputError(f"batches of {batch_size} cannot be made of buckets of {list(populations)} images")
        self.populations, self.batch_size, self.seed = tuple(populations), batch_size, seed
        self._kept: _Epoch | None = None

    def at(self, step: int) -> tuple[int, int]:
        """(bucket, batch): optimizer step `step` takes images batch * B to (batch + 1) * B - 1 of the bucket's stream;
        all count from 0."""
        kept = self._kept
        if kept is None or not kept.first <= step < kept.first + len(kept.buckets):
            kept = self._kept = self._draw(self.epoch(step))
        place = step - kept.first
        return int(kept.buckets[place]), int(kept.batches[place])

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to: the last with steps_before(epoch) <= step."""
        total = sum(self.populations)
        low = step * self.batch_size // total
        high = (step + len(self.populations)) * self.batch_size // total + 1  # a floor takes less than 1 from a bucket
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before this one: the sum over buckets of floor(epoch N_b / B)."""
        return sum(self._batches_before(epoch))

    def _batches_before(self, epoch: int) -> list[int]:
        return [epoch * population // self.batch_size for population in self.populations]

    def _draw(self, epoch: int) -> "_Epoch":
        starts, ends = self._batches_before(epoch), self._batches_before(epoch + 1)
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        order = torch.argsort(uniform(self.seed, Purpose.BATCH, epoch, sum(counts))[0], stable=True).numpy()
        buckets = np.repeat(np.arange(len(counts)), counts)[order]
        batches = np.empty_like(buckets)
        for bucket, (start, end) in enumerate(zip(starts, ends, strict=True)):
            batches[buckets == bucket] = np.arange(start, end)
        return _Epoch(sum(starts), buckets, batches)


class _Epoch(NamedTuple):
    first: int  # step
    buckets: NDArray[np.int64]  # of each step
    batches: NDArray[np.int64]  # of the bucket's stream
