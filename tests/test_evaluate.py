"""The loss at fixed noise levels: of held-out and of training images, with raw and with averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_unet.codec import PixelCodec
from diffusion_unet.schedule import NoiseSchedule
from training.batches import Batch
from training.config import Config, DataConfig, ObjectiveConfig
from training.evaluate import CHUNK, fixed_levels, level_losses, measure

SCHEDULE = NoiseSchedule.edm()
CONFIG = Config(
    data=DataConfig(train_data_dir="nowhere", resolution=8),
    objective=ObjectiveConfig(ln_sigma_mean=0.0, ln_sigma_std=1.0),
)


class Constant(nn.Module):
    """In the place of a network: the same number everywhere, and a note of how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.25))
        self.training_when_called: set[bool] = set()

    def forward(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, None]:
        self.training_when_called.add(self.training)
        return self.value.expand_as(x), None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self.value.data += 1
        yield
        self.value.data -= 1


def batch(count: int, size: tuple[int, int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *size, 3), generator=generator, dtype=torch.uint8)
    ones = torch.ones(count, dtype=torch.float64)
    return Batch(range(count), torch.randn(count, 3, *size, generator=generator), ones, ones, images)


def expected(batches: list[Batch], level: float, value: float) -> float:
    """Of the EDM target (x0 - c_skip x) / c_out, Karras et al. 2022, table 1, in float64; each image counts alike."""
    losses, data = [], SCHEDULE.sigma_data
    for each in batches:
        assert each.images is not None
        x0, noise = (each.images.double() / 127.5 - 1).permute(0, 3, 1, 2), each.noise.double()
        c_skip = data**2 / (level**2 + data**2)
        target = (x0 - c_skip * (x0 + level * noise)) * math.sqrt(level**2 + data**2) / (level * data)
        losses += (value - target).square().mean(dim=(1, 2, 3)).tolist()
    return sum(losses) / len(losses)


def test_each_set_of_images_with_each_set_of_weights() -> None:
    network = Constant().train()
    model: Any = SimpleNamespace(
        schedule=SCHEDULE, codec=PixelCodec(3, std=1.0), unet=SimpleNamespace(device=torch.device("cpu"))
    )
    held_out = [batch(CHUNK + 3, (8, 8), seed=0), batch(2, (4, 12), seed=1)]
    seen = [batch(5, (8, 8), seed=2)]
    weights = {"raw": nullcontext, "0.9999": network.averaged}
    losses = measure(network, model, {"held_out_loss": held_out, "training_loss": seen, "no": []}, weights, CONFIG)
    assert {kind: list(by_weights) for kind, by_weights in losses.items()} == {
        "held_out_loss": ["raw", "0.9999"],
        "training_loss": ["raw", "0.9999"],
    }
    levels = fixed_levels(SCHEDULE, CONFIG).tolist()
    for kind, batches in (("held_out_loss", held_out), ("training_loss", seen)):
        for name, value in (("raw", 0.25), ("0.9999", 1.25)):
            wanted = {f"{level:.4g}": expected(batches, level, value) for level in levels}
            assert losses[kind][name] == pytest.approx(wanted, rel=1e-5)
    assert network.training and network.training_when_called == {False}


def test_the_levels_are_the_middles_of_ranges_that_see_as_many_images() -> None:
    levels = fixed_levels(SCHEDULE, CONFIG)
    within = torch.tensor([SCHEDULE.sigma_min, SCHEDULE.sigma_max]).double().log()
    low, high = torch.special.ndtr(within)
    shares = (torch.special.ndtr(levels.log()) - low) / (high - low)  # of the training distribution, below each level
    torch.testing.assert_close(shares, (torch.arange(8).double() + 0.5) / 8, atol=1e-6, rtol=0)
    counts = level_losses(SCHEDULE, CONFIG)
    draws = torch.randn(80_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    counts.add(draws, torch.zeros(len(draws)))
    assert counts.names == [f"{level:.4g}" for level in levels.tolist()]
    assert all(abs(count - 10_000) < 400 for count in counts.state()["counts"])


def test_levels_that_are_shifted_with_the_size_are_those_of_the_resolution() -> None:
    shifted = replace(CONFIG, objective=replace(CONFIG.objective, resolution_shift=4))
    torch.testing.assert_close(
        fixed_levels(SCHEDULE, shifted)[3:5], 2 * fixed_levels(SCHEDULE, CONFIG)[3:5], rtol=1e-3, atol=0
    )
