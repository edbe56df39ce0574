"""What a model is worth: its loss on images kept from training, and whether its pictures show what was asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_unet.model import DiffusionModel

from .batches import Batch, encode
from .config import ObjectiveConfig
from .objective import image_losses, loss_weight, noise_levels

LEVELS = 8  # noise levels of a held-out loss, at even quantiles of the training distribution
CHUNK = 64  # images at once

Draw = Callable[[list[str], list[int]], list[Image]]


@torch.no_grad()
def held_out_loss(network: nn.Module, model: DiffusionModel, batch: Batch, config: ObjectiveConfig) -> dict[str, float]:
    """Mean loss of the batch at each of 8 fixed noise levels, by sigma; the batch's noise is used at every level.

    network(x, sigma, ids) -> output, on the device of `model.unet`."""
    levels = noise_levels((torch.arange(LEVELS) + 0.5) / LEVELS, model.schedule, config)
    weights = loss_weight(levels, model.schedule, config)
    device = model.unet.device
    parts = [batch.part(number, -(-len(batch.indices) // CHUNK)) for number in range(-(-len(batch.indices) // CHUNK))]
    totals = torch.zeros(LEVELS, dtype=torch.float64)
    for part in parts:
        x0, noise = encode(part, model, device), part.noise.to(device)
        ids = None if part.ids is None else part.ids.to(device)
        for place, (level, weight) in enumerate(zip(levels, weights, strict=True)):
            sigma = level.expand(len(x0))
            output = network(x0 + float(level) * noise, sigma, ids)
            losses = image_losses(output, model.schedule.target(x0, noise, sigma), weight.expand(len(x0)))
            totals[place] += float(losses.sum())
    return {
        f"{level:.4g}": total / len(batch.indices)
        for level, total in zip(levels.tolist(), totals.tolist(), strict=True)
    }


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

    drawn = {"trained": pictures(fashion.captions), "held_out": pictures(fashion.held_out_captions)}
    right = [label for label, _ in wanted]
    real = fashion.load()
    photographs = fashion.resize(torch.tensor(real.images)[:, None].float(), drawn["trained"][0].width)[:, 0]
    return {
        "prompt_accuracy": {name: prompt_accuracy(images, right, classifier) for name, images in drawn.items()},
        "ceiling": prompt_accuracy(photographs.round().clamp(0, 255).to(torch.uint8), real.labels, classifier),
        "images_per_class": images_per_class,
    }
