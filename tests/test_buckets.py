"""Buckets against a search through all sizes, and their course through a run against one written out step by step."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from diffusion_unet.errors import InputError
from training.buckets import MAX_ASPECT, Course, assign, bucket_sizes, cover, fill

POPULATIONS = ([10], [3], [17, 0, 1, 9], [64, 5, 5, 130], [1, 1, 1])
BATCHES = (1, 4, 7, 64)


@pytest.mark.parametrize(
    ("resolution", "step", "max_aspect"), [(512, 64, 2.0), (1024, 64, 4.0), (96, 8, 1.0), (7, 1, 3)]
)
def test_sizes_are_those_of_a_search(resolution: int, step: int, max_aspect: float) -> None:
    sides = range(step, resolution * 8, step)
    fitting = {(h, w) for h in sides for w in sides if h * w <= resolution**2}
    largest = {(h, w) for h, w in fitting if not {(h + step, w), (h, w + step)} & fitting}
    expected = sorted((h, w) for h, w in largest if max(h, w) / min(h, w) <= max_aspect)
    assert bucket_sizes(resolution, step, max_aspect) == expected
    assert (resolution, resolution) in expected and {(w, h) for h, w in expected} == set(expected)


def test_sizes_of_stable_diffusion() -> None:
    assert bucket_sizes(512, 64) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


def test_sizes_that_cannot_be() -> None:
    for resolution, step in ((500, 64), (32, 64), (64, 0)):
        with pytest.raises(InputError, match=r"data\.resolution.*data\.bucket_step"):
            bucket_sizes(resolution, step)
    for aspect in (0.5, math.nan, math.inf):
        with pytest.raises(InputError, match=r"data\.max_aspect"):
            bucket_sizes(512, 64, aspect)


def test_nearest_aspect() -> None:
    buckets = bucket_sizes(512, 64)
    widths, heights = np.random.default_rng(0).integers(1, 5000, (2, 2000)).tolist()
    images = list(zip(widths, heights, strict=True))
    for (width, height), chosen in zip(images, assign(images, buckets), strict=True):
        distances = [abs(math.log(width / height) - math.log(w / h)) for h, w in buckets]
        assert distances[chosen] == pytest.approx(min(distances), abs=1e-12)
    assert [buckets[i] for i in assign([(512, 512), (3, 3), (9000, 1), (1, 9000)], buckets)] == [
        (512, 512), (512, 512), (384, 640), (640, 384),
    ]  # fmt: skip


def test_ties_go_to_the_larger() -> None:
    # pq:1 is exactly between p^2:1 and q^2:1; floating-point logarithms put it to one side for some p and q
    for p in range(1, 20):
        for q in range(p + 1, 20):
            near, far = (10, 10 * p**2), (10, 10 * q**2)
            assert assign([(7 * p * q, 7)], [near, far]) == assign([(7, 7 * p * q)], [near[::-1], far[::-1]]) == [1]
            assert assign([(7 * p * q, 7)], [(1000, 1000 * p**2), far]) == [0]
    assert assign([(5, 5), (9, 9)], [(32, 32), (64, 64)]) == [1, 1]
    assert assign([(5, 5)], [(32, 64), (64, 32)]) == [0] and assign([], [(32, 32)]) == []


def test_what_covers_a_bucket() -> None:
    generator = np.random.default_rng(1)
    for width, height, bucket_height, bucket_width in generator.integers(1, 700, (3000, 4)).tolist():
        found = cover((width, height), (bucket_height, bucket_width))
        scale = max(Fraction(bucket_height, height), Fraction(bucket_width, width))
        exact = height * scale, width * scale
        assert found[0] >= bucket_height and found[1] >= bucket_width
        assert found[0] == bucket_height or found[1] == bucket_width
        limits = max(bucket_height, MAX_ASPECT * bucket_width), max(bucket_width, MAX_ASPECT * bucket_height)
        for side, wanted, limit in zip(found, exact, limits, strict=True):
            assert side == limit if wanted > limit else abs(side - wanted) <= Fraction(1, 2) + Fraction(1, 10**9)


def test_strips_are_bounded() -> None:
    assert cover((30000, 1), (64, 128)) == (64, 64 * MAX_ASPECT)
    assert cover((1, 30000), (64, 128)) == (128 * MAX_ASPECT, 128)
    assert cover((30000, 10), (32, 32)) == (32, 32 * MAX_ASPECT)


def written_out(populations: list[int], batch_size: int, epochs: int) -> list[Counter[int]]:
    """Batches of each bucket in each epoch, by what is left over of the one before."""
    left, batches = [0] * len(populations), []
    for _ in range(epochs):
        left = [rest + images for rest, images in zip(left, populations, strict=True)]
        batches.append(Counter({bucket: rest // batch_size for bucket, rest in enumerate(left) if rest >= batch_size}))
        left = [rest % batch_size for rest in left]
    return batches


@pytest.mark.parametrize("populations", POPULATIONS)
@pytest.mark.parametrize("batch_size", BATCHES)
def test_nothing_is_dropped_or_repeated(populations: list[int], batch_size: int) -> None:
    course, epochs = Course(populations, batch_size, seed=3), 70
    step, coming = 0, [0] * len(populations)
    for epoch, expected in enumerate(written_out(populations, batch_size, epochs)):
        assert course.steps_before(epoch) == step
        taken: Counter[int] = Counter()
        for _ in range(expected.total()):
            bucket, batch = course.at(step)
            assert batch == coming[bucket]  # the batches of a stream, each once, in their order
            assert course.epoch(step) == epoch
            coming[bucket] += 1
            taken[bucket] += 1
            step += 1
        assert taken == expected
        for images, batches in zip(populations, coming, strict=True):
            assert 0 <= (epoch + 1) * images - batches * batch_size < batch_size


@pytest.mark.parametrize("populations", POPULATIONS)
def test_any_step_alone_is_that_of_the_walk(populations: list[int]) -> None:
    walking = Course(populations, 4, seed=9)
    walk = [walking.at(step) for step in range(300)]
    assert [Course(populations, 4, seed=9).at(step) for step in range(300)] == walk
    assert [walking.at(step) for step in reversed(range(300))] == walk[::-1]


def test_far_steps() -> None:
    course = Course([1000, 77, 3], 64, seed=0)
    for step in (10**6, 10**12, 2**53):
        epoch = course.epoch(step)
        assert course.steps_before(epoch) <= step < course.steps_before(epoch + 1)
        bucket, batch = course.at(step)
        assert abs(batch * 64 - epoch * [1000, 77, 3][bucket]) <= 1064


def test_one_bucket_is_taken_in_order() -> None:
    for size, batch_size in ((50, 4), (3, 10)):
        course = Course([size], batch_size, seed=1)
        assert [course.at(step) for step in range(200)] == [(0, step) for step in range(200)]


def test_the_order_of_an_epoch_is_drawn() -> None:
    course = Course([400, 400], 4, seed=5)
    epochs = [[course.at(step)[0] for step in range(200 * epoch, 200 * (epoch + 1))] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    changes = sum(first != second for first, second in zip(epochs[0], epochs[0][1:], strict=False))
    assert abs(changes - 100) < 5 * math.sqrt(200 / 4)  # neighbours are of two buckets half of the time
    other = Course([400, 400], 4, seed=6)
    assert [other.at(step)[0] for step in range(200)] != epochs[0]


def test_courses_that_cannot_be() -> None:
    for populations, batch_size in (([], 4), ([0, 0], 4), ([3, -1], 4), ([3], 0)):
        with pytest.raises(InputError, match="images"):
            Course(populations, batch_size, seed=0)


def test_fill() -> None:
    assert fill([10, 0, 3, 4], 4) == ([2.5, 0.0, 0.75, 1.0], [2])
