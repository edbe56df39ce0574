"""What a model is worth: its loss on images kept from training, and whether its pictures show what was asked for."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.schedule import NoiseSchedule

from .batches import Batch, encode, told
from .config import Config
from .metrics import LevelLosses
from .objective import huber_c, image_losses, loss_weight, noise_levels

LEVELS = 8  # noise levels of a held-out loss, at even quantiles of the training distribution
CHUNK = 64  # images at once

Draw = Callable[[list[str], list[int]], list[Image]]


def fixed_levels(schedule: NoiseSchedule, config: Config) -> Tensor:
    """The 8 sigmas of a held-out loss, float64 [8], rising: the medians of the ranges that `level_losses` counts."""
    return _levels((torch.arange(LEVELS) + 0.5) / LEVELS, schedule, config)


def level_losses(schedule: NoiseSchedule, config: Config, **settings: Any) -> LevelLosses:
    """A count of the training loss in 8 ranges of sigma that each see as many images; `settings` as of LevelLosses."""
    edges = _levels(torch.arange(1, LEVELS) / LEVELS, schedule, config)
    return LevelLosses(fixed_levels(schedule, config).tolist(), edges.tolist(), **settings)


def _levels(u: Tensor, schedule: NoiseSchedule, config: Config) -> Tensor:
    """Those of `data.resolution`: where levels are shifted with the size, the same ones for images of every size."""
    return noise_levels(u, schedule, config.objective, config.data.resolution**2).sort().values


def measure(
    network: nn.Module,
    model: DiffusionModel,
    sets: Mapping[str, Sequence[Batch]],
    weights: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    config: Config,
    chunk: int = CHUNK,
    heed: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, dict[str, float]]]:
    """{"held_out_loss": {"raw": {"0.0871": loss, ...}, "0.9999": {...}}, ...}: `held_out_loss` of each set of images
    with each set of weights, in eval mode.

    sets: the batches of each by its name; one of no images is left out. weights: for each name what puts those weights
    in place while it is entered, nullcontext for the raw ones. heed: called between passes, and may raise. By how much
    the loss of held-out images is above that of as many training images says what the network knows by heart."""
    present = {kind: batches for kind, batches in sets.items() if batches}
    losses: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in present}
    training = network.training
    network.eval()
    try:
        for name, in_place in weights.items():
            with in_place():
                for kind, batches in present.items():
                    losses[kind][name] = held_out_loss(network, model, batches, config, chunk, heed)
    finally:
        network.train(training)
    return losses


@torch.no_grad()
def held_out_loss(
    network: nn.Module,
    model: DiffusionModel,
    batches: Sequence[Batch],
    config: Config,
    chunk: int = CHUNK,
    heed: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss of the images at each of 8 fixed noise levels, by sigma; an image has the same noise at every level.

    network: as training's Network, on the device of `model.unet`; it sees `chunk` images at once. The loss is that of
    `objective`, without a learned weight, which is another for other weights."""
    levels = fixed_levels(model.schedule, config)
    weights = loss_weight(levels, model.schedule, config.objective)
    device, huber = model.unet.device, huber_c(config.objective)
    totals, count = torch.zeros(LEVELS, dtype=torch.float64), 0
    for batch in batches:
        parts = -(-len(batch.indices) // chunk)
        for part in (batch.part(number, parts) for number in range(parts)):
            heed()
            x0, noise, given = encode(part, model, device), part.noise.to(device), told(part, model, device)
            for place, (level, weight) in enumerate(zip(levels, weights, strict=True)):
                sigma = level.expand(len(x0))
                output, _ = network(x0 + float(level) * noise, sigma, **given)
                target = model.schedule.target(x0, noise, sigma)
                totals[place] += float(image_losses(output, target, weight.expand(len(x0)), huber).sum())
            count += len(x0)
    return {f"{level:.4g}": total / count for level, total in zip(levels.tolist(), totals.tolist(), strict=True)}


@torch.no_grad()
def prompt_accuracy(
    images: Sequence[Image] | ArrayLike, labels: Sequence[int] | ArrayLike, classifier: nn.Module
) -> float:
    """Share of the images, all of one size, that the classifier takes for their label.

    images: pictures, or uint8 [N, H, W] or [N, H, W, C]; classifier: such uint8 tensors -> logits [N, classes]."""
    wanted = torch.as_tensor(np.asarray(labels))
    if len(wanted) == 0:
        raise ValueError("no images to score")
    right = 0
    for start in range(0, len(wanted), CHUNK):
        chunk: Any = images[start : start + CHUNK]  # type: ignore[index]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in chunk]))
        right += int((_classify(classifier, pixels) == wanted[start : start + CHUNK]).sum())
    return right / len(wanted)


def _classify(classifier: nn.Module, pixels: Tensor) -> Tensor:
    device = next(classifier.parameters()).device
    answer: Tensor = classifier(pixels.to(device)).argmax(dim=1).cpu()
    return answer


def score_fashion(draw: Draw, images_per_class: int) -> dict[str, Any]:
    """Prompt accuracy of a model trained on Fashion-MNIST, in the wordings of the training and in wordings kept from
    it, beside that of real photographs at the size of the pictures, which is the ceiling.

    draw(prompts, seeds) -> a picture for each prompt, with the seed at its place. Picture i of a class has seed i and
    wording i, around the wordings."""
    from . import fashion

    classifier, labels = fashion.Classifier.load(), range(len(fashion.CLASSES))
    wanted = [(label, seed) for label in labels for seed in range(images_per_class)]

    def pictures(captions: Callable[[int], Sequence[str]]) -> Sequence[Image]:
        wordings = min(len(captions(label)) for label in labels)
        return draw([captions(label)[seed % wordings] for label, seed in wanted], [seed for _, seed in wanted])

    try:
        drawn = {"trained": pictures(fashion.captions), "held_out": pictures(fashion.held_out_captions)}
    except InputError as error:
        raise InputError(f"{error} (what is drawn is clothing, by default: give --prompts for other models)") from None
    right = [label for label, _ in wanted]
    real = fashion.load()
    photographs = fashion.resize(torch.tensor(real.images)[:, None].float(), drawn["trained"][0].width)[:, 0]
    return {
        "prompt_accuracy": {name: prompt_accuracy(images, right, classifier) for name, images in drawn.items()},
        "ceiling": prompt_accuracy(photographs.round().clamp(0, 255).to(torch.uint8), real.labels, classifier),
        "images_per_class": images_per_class,
    }
