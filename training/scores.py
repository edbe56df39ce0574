"""Scores of drawn pictures: FID and KID against real ones, CLIP score, prompt accuracy; with networks that are named.

A number means something only beside others made with the same networks, reference pictures and number of pictures.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_unet import prompt_files
from diffusion_unet.errors import InputError
from diffusion_unet.images import to_array, to_image
from diffusion_unet.model import DiffusionModel

from .config import DataConfig
from .features import Clip, Network
from .sources import open_source

Draw = Callable[[list[str], list[int]], list[Image]]

CHUNK = 64  # pictures at once
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as in the paper's code; with fewer pictures as many as there are


@torch.no_grad()
def score(
    draw: Draw,
    prompts: Sequence[str],
    seeds: Sequence[int],
    references: Iterable[Image] = (),
    *,
    features: Network | None = None,
    clip: Clip | None = None,
    classifier: Network | None = None,
    labels: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The scores whose networks are given, with the numbers of pictures that they are from.

    draw(prompts, seeds) -> a picture for each prompt, with the seed at its place. features: with `references`, for FID
    and KID. clip: for the CLIP score. classifier: with `labels`, the class of each prompt, for prompt accuracy.
    Raises InputError where a network lacks what it is compared with."""
    _check(prompts, seeds, features, clip, classifier, labels)
    seen: dict[str, list[Tensor]] = {"features": [], "embeddings": [], "logits": []}
    networks = {"features": features, "embeddings": clip.images if clip else None, "logits": classifier}
    for start in range(0, len(prompts), CHUNK):
        rows = slice(start, start + CHUNK)
        images = draw(list(prompts[rows]), list(seeds[rows]))
        for name, network in networks.items():
            if network is not None:
                seen[name].append(network(images).cpu())
    scores: dict[str, Any] = {"images": len(prompts)}
    if features is not None:
        real = [features(images).cpu() for images in _chunks(references)]
        scores |= _distances(torch.cat(real) if real else torch.empty(0, 1), torch.cat(seen["features"]))
    if clip is not None:
        texts, cut = clip.texts(list(prompts))
        scores["clip_score"] = clip_score(torch.cat(seen["embeddings"]), texts.cpu())
        scores["prompts_cut"] = cut
    if labels is not None and classifier is not None:
        right = torch.cat(seen["logits"]).argmax(dim=1) == torch.tensor(labels)
        scores["prompt_accuracy"] = float(right.double().mean())
    return scores


def _check(
    prompts: Sequence[str],
    seeds: Sequence[int],
    features: Network | None,
    clip: Clip | None,
    classifier: Network | None,
    labels: Sequence[int] | None,
) -> None:
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: one of each for every picture")
    if classifier is not None and (labels is None or len(labels) != len(prompts)):
        raise InputError('prompt accuracy needs a class for every prompt: give a .jsonl file with "prompt" and "label"')
    if features is not None:
        _metrics()
    if features is None and clip is None and classifier is None:
        raise InputError("nothing to score with: name a feature network, a CLIP model or a classifier")


def _chunks(images: Iterable[Image]) -> Iterator[list[Image]]:
    chunk: list[Image] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# ---- the scores, of features


def _distances(real: Tensor, drawn: Tensor) -> dict[str, Any]:
    fewest, width = min(len(real), len(drawn)), drawn.shape[1]
    if fewest < 2:
        raise InputError(f"FID and KID need two pictures of each kind: {len(drawn)} drawn, {len(real)} for reference")
    flat = f"; {fewest} pictures for {width} dimensions: little of the difference is the model's" * (fewest <= width)
    mean, std = kid(real, drawn)
    return {
        "references": len(real),
        "feature_dimensions": width,
        "fid": fid(real, drawn),
        "fid_note": f"biased, the higher the fewer the pictures: compare at equal numbers only{flat}",
        "kid": mean,
        "kid_std": std,
        "kid_note": f"unbiased; of subsets of {min(SUBSET_SIZE, fewest)} pictures",
    }


def fid(real: Tensor, drawn: Tensor) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the means and covariances of features [N, D] and [N', D].

    Heusel et al. 2017 (arXiv:1706.08500), by torchmetrics, in float64. Raises InputError without torchmetrics."""
    metric = _metrics()[0](_Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def kid(real: Tensor, drawn: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, over subsets of the features [N, D] and [N', D], of the unbiased estimate of the
    squared maximum mean discrepancy, with the kernel (x . y / D + 1)^3.

    Binkowski et al. 2018 (arXiv:1801.01401), by torchmetrics, in float64; which subsets, is the same at every call.
    Raises InputError without torchmetrics."""
    size = min(SUBSET_SIZE, len(real), len(drawn))
    subsets = 1 if size == len(real) == len(drawn) else SUBSETS
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all", UserWarning)
        torch.manual_seed(0)
        metric = _metrics()[1](_Given(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(drawn.double(), real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def clip_score(images: Tensor, texts: Tensor) -> float:
    """The mean of max(100 cos(image, text), 0) over pairs of embeddings, [N, D] each.

    Hessel et al. 2021 (arXiv:2104.08718), equation 1, with 100 in the place of its 2.5, as is usual since."""
    return float((100 * F.cosine_similarity(images.double(), texts.double(), dim=1)).clamp(min=0).mean())


class _Given(nn.Module):
    """In the place of a feature network, where the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metrics() -> tuple[Any, Any]:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError:
        raise InputError("FID and KID: torchmetrics is not installed: pip install 'diffusion-unet[scores]'") from None
    return FrechetInceptionDistance, KernelInceptionDistance


# ---- prompts


def reference_images(folder: str, model: DiffusionModel) -> Iterator[Image]:
    """The pictures of a folder at the size and with the channels of the model's own. Raises InputError."""
    config, channels = DataConfig(train_data_dir=folder, instance_prompt=""), model.codec.channels
    try:
        source = open_source(config, channels)
    except InputError as error:
        raise InputError(str(error).replace("data.train_data_dir", "--references")) from None
    return (to_image(to_array(source.image(index), model.image_size)) for index in range(len(source)))


def read_prompts(path: Path) -> tuple[list[str], list[int] | None]:
    """The prompts of a file (see `prompt_files`), and their labels, None where there are none. Raises InputError."""
    rows = prompt_files.read_prompts(path, prompt_files.SCORED)
    labels = [row["label"] for row in rows if "label" in row]
    if labels and len(labels) != len(rows):
        raise InputError(f"{path}: {len(rows) - len(labels)} of {len(rows)} prompts have no label: give all or none")
    return [row["prompt"] for row in rows], labels or None
