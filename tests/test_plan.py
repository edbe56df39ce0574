"""The plan of a run: the same whatever the processes and micro-batches, and every sample once an epoch."""

import math

import pytest
import torch

from training.plan import Draws, Plan, held_out_split, share, step_indices

FIELDS = ("samples", "crop", "flip", "caption", "drop", "level")


def join(parts: list[Draws]) -> dict[str, torch.Tensor]:
    return {field: torch.cat([getattr(part, field) for part in parts]) for field in FIELDS}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("stratified", [True, False])
def test_ranks_and_micro_batches_change_nothing(world: int, stratified: bool) -> None:
    plan = Plan(7, 13, (range(6), [8, 9], range(10, 12)), random_flip=True, stratified=stratified)
    whole = plan.draw(range(0, 3 * 13))
    parts = [
        plan.draw(share(step_indices(step, 13, rank, world), micro, 2))
        for step in range(3)
        for rank in range(world)
        for micro in range(2)
    ]
    assert [index for part in parts for index in part.indices] == list(range(39))
    for field, tensor in join(parts).items():
        assert torch.equal(tensor, getattr(whole, field)), field


@pytest.mark.parametrize(("size", "parts"), [(64, 4), (13, 4), (5, 2), (3, 3)])
def test_shares_are_even_neighbours(size: int, parts: int) -> None:
    shares = [share(range(100, 100 + size), part, parts) for part in range(parts)]
    assert [index for indices in shares for index in indices] == list(range(100, 100 + size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_epoch_has_every_sample_once_and_its_own_order() -> None:
    plan = Plan(1, 8, (range(50),))
    epochs = [plan.draw(range(50 * epoch, 50 * (epoch + 1))).samples.tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Plan(2, 8, (range(50),)).draw(range(50)).samples.tolist() != epochs[0]


def test_shares_of_flips_and_dropped_captions() -> None:
    draws = Plan(3, 8, (range(100),), random_flip=True).draw(range(20_000))
    for drawn, share_of in ((draws.flip, 0.5), (draws.drop < 0.1, 0.1)):
        deviation = math.sqrt(share_of * (1 - share_of) / 20_000)
        assert abs(drawn.double().mean() - share_of) < 5 * deviation
    assert draws.crop.min() >= 0 and draws.crop.max() < 1 and abs(draws.crop.mean() - 0.5) < 0.01
    still = Plan(3, 8, (range(100),), center_crop=True).draw(range(100))
    assert not still.flip.any() and bool((still.crop == 0.5).all())


def test_stratified_levels_cover_every_batch_evenly() -> None:
    for first in (0, 640, 10**9, 2**52):
        levels = Plan(5, 8, (range(9),)).draw(range(first, first + 64)).level.sort().values
        assert levels.min() >= 0 and levels.max() < 1
        expected = (torch.arange(64) + 0.5) / 64
        assert (levels - expected).abs().max() < 0.04  # independent draws miss by about 0.1
    free = Plan(5, 8, (range(9),), stratified=False).draw(range(64)).level.sort().values
    assert (free - (torch.arange(64) + 0.5) / 64).abs().max() > 0.04


def test_held_out_samples_are_a_fixed_part() -> None:
    kept, held_out = held_out_split(4, 30, 5)
    assert len(held_out) == 5 and sorted(kept + held_out) == list(range(30))
    assert held_out_split(4, 30, 5) == (kept, held_out)
    assert held_out_split(5, 30, 5)[1] != held_out
    assert held_out_split(4, 30, 0) == (list(range(30)), [])


def test_a_batch_is_of_one_bucket_and_nothing_is_dropped_or_repeated() -> None:
    members = (range(7), range(7, 20), range(20, 23))
    plan = Plan(9, 4, members)
    steps = [plan.draw(step_indices(step, 4)).samples.tolist() for step in range(23)]  # four epochs of 23 images
    assert all(len({next(b for b, own in enumerate(members) if one in own) for one in step}) == 1 for step in steps)
    seen = [sample for step in steps for sample in step]
    assert sorted(seen) == sorted(list(range(23)) * 4)
    assert [plan.draw(step_indices(step, 4)).samples.tolist() for step in reversed(range(23))] == steps[::-1]


def test_instances_and_images_of_their_class_take_turns() -> None:
    plan = Plan(2, 6, (range(5),), classes=range(5, 12))
    samples = plan.draw(range(70)).samples
    for mine, own in ((samples[0::2], range(5)), (samples[1::2], range(5, 12))):
        assert sorted(mine.tolist()) == sorted(list(own) * (35 // len(own)))


def test_an_order_is_drawn_for_each_image() -> None:
    plan = Plan(2, 6, (range(5),))
    orders = [plan.order(index, 4) for index in range(200)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len({tuple(order) for order in orders}) == 24
    assert plan.order(7, 4) == Plan(2, 3, (range(9),)).order(7, 4)
