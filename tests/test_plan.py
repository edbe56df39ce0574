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
    plan = Plan(seed=7, size=10, random_flip=True, caption_dropout=0.3, stratified=stratified)
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
    plan = Plan(seed=1, size=50)
    epochs = [plan.draw(range(50 * epoch, 50 * (epoch + 1))).samples.tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Plan(seed=2, size=50).draw(range(50)).samples.tolist() != epochs[0]


def test_shares_of_flips_and_dropped_captions() -> None:
    draws = Plan(seed=3, size=100, random_flip=True, caption_dropout=0.1).draw(range(20_000))
    for drawn, share_of in ((draws.flip, 0.5), (draws.drop, 0.1)):
        deviation = math.sqrt(share_of * (1 - share_of) / 20_000)
        assert abs(drawn.double().mean() - share_of) < 5 * deviation
    assert draws.crop.min() >= 0 and draws.crop.max() < 1 and abs(draws.crop.mean() - 0.5) < 0.01
    still = Plan(seed=3, size=100, center_crop=True).draw(range(100))
    assert not still.flip.any() and not still.drop.any() and bool((still.crop == 0.5).all())


def test_stratified_levels_cover_every_batch_evenly() -> None:
    for first in (0, 640, 10**9, 2**52):
        levels = Plan(seed=5, size=9).draw(range(first, first + 64)).level.sort().values
        assert levels.min() >= 0 and levels.max() < 1
        expected = (torch.arange(64) + 0.5) / 64
        assert (levels - expected).abs().max() < 0.04  # independent draws miss by about 0.1
    free = Plan(seed=5, size=9, stratified=False).draw(range(64)).level.sort().values
    assert (free - (torch.arange(64) + 0.5) / 64).abs().max() > 0.04


def test_held_out_samples_are_a_fixed_part() -> None:
    kept, held_out = held_out_split(4, 30, 5)
    assert len(held_out) == 5 and sorted(kept + held_out) == list(range(30))
    assert held_out_split(4, 30, 5) == (kept, held_out)
    assert held_out_split(5, 30, 5)[1] != held_out
    assert held_out_split(4, 30, 0) == (list(range(30)), [])
