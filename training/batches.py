"""The batches of a run: what each optimizer step computes with, drawn at the addresses of its images."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_unet.codec import LatentCodec
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.random import Purpose, normal

from .config import Config
from .data import Dataset
from .objective import loss_weight, noise_levels
from .plan import Plan, share, step_indices

POSTERIOR = 1  # `draw` of the noise with which an autoencoder's latents are sampled
HELD_OUT = 2**62  # index of the first held-out image: no run gets that far


class Batch(NamedTuple):
    """What one process computes of one step, on the CPU; [B, ...] each."""

    indices: range  # global image indices
    images: Tensor  # uint8 [B, R, R, C]
    ids: Tensor | None  # tokens int64 [B, L]
    noise: Tensor  # float32 [B, C, H, W], of the network's space
    latent_noise: Tensor | None  # the same, for an autoencoder
    sigma: Tensor  # float64 [B]
    weight: Tensor  # float64 [B], of the squared error

    def part(self, number: int, parts: int) -> "Batch":
        """Micro-batch `number` of `parts`, neighbouring images."""
        indices = share(self.indices, number, parts)
        start = indices.start - self.indices.start
        rows = slice(start, start + len(indices))
        return Batch(indices, *(None if value is None else value[rows] for value in self[1:]))  # type: ignore[arg-type]


class Batches:
    """Batches of process `rank` of `world`; `cut` counts the captions that are longer than the text encoder reads."""

    def __init__(self, config: Config, dataset: Dataset, model: DiffusionModel, rank: int = 0, world: int = 1):
        self.config, self.dataset, self.model = config, dataset, model
        self.rank, self.world = rank, world
        codec, unet = model.codec, model.unet.config
        channels = codec.latent_channels if isinstance(codec, LatentCodec) else codec.channels
        if unet.in_channels != channels:
            raise InputError(
                f"the U-Net takes {unet.in_channels} channels and the codec gives {channels}: not trained here"
            )
        if config.data.resolution % codec.scale_factor:
            raise InputError(
                f"data.resolution: {config.data.resolution} is no multiple of the autoencoder's {codec.scale_factor}"
            )
        self.shape = (channels, *[config.data.resolution // codec.scale_factor] * 2)  # of one image to the network
        self.samples, self.held_out = dataset.split(config.train.seed, config.data.held_out)
        data = config.data
        self.plan = Plan(
            config.train.seed,
            len(self.samples),
            data.center_crop,
            data.random_flip,
            data.caption_dropout,
            config.objective.stratified,
        )
        self._ids: dict[str, Tensor] = {}
        self.cut = 0
        if model.text is not None:
            texts = list(dict.fromkeys(["", *(text for texts in dataset.captions for text in texts)]))
            ids, self.cut = model.text.tokenize(texts)
            self._ids = dict(zip(texts, ids.unbind(), strict=True))

    def assemble(self, step: int) -> Batch:
        """This process's images of optimizer step `step`, counted from 0."""
        indices = step_indices(step, self.config.train.train_batch_size, self.rank, self.world)
        draws = self.plan.draw(indices)
        chosen = [self.samples[sample] for sample in draws.samples.tolist()]
        captions = [
            "" if drop else self.dataset.caption(sample, u)
            for sample, u, drop in zip(chosen, draws.caption.tolist(), draws.drop.tolist(), strict=True)
        ]
        images = self.dataset.images(chosen, draws.crop, draws.flip)
        return self._batch(indices, images, captions, draws.level)

    def held_out_batch(self, limit: int) -> Batch | None:
        """The first `limit` held-out images, cropped in the middle, each with its first caption and its own noise."""
        chosen = self.held_out[:limit]
        if not chosen:
            return None
        middle, still = torch.full((len(chosen), 2), 0.5), torch.zeros(len(chosen), dtype=torch.bool)
        images = self.dataset.images(chosen, middle, still)
        captions = [self.dataset.captions[sample][0] for sample in chosen]
        indices = range(HELD_OUT, HELD_OUT + len(chosen))
        return self._batch(indices, images, captions, torch.full((len(chosen),), 0.5, dtype=torch.float64))

    def _batch(self, indices: range, images: Tensor, captions: list[str], level: Tensor) -> Batch:
        seed, latents = self.config.train.seed, isinstance(self.model.codec, LatentCodec)
        sigma = noise_levels(level, self.model.schedule, self.config.objective)
        return Batch(
            indices,
            images,
            torch.stack([self._ids[caption] for caption in captions]) if self._ids else None,
            normal(seed, Purpose.NOISE, indices, self.shape),
            normal(seed, Purpose.NOISE, indices, self.shape, draw=POSTERIOR) if latents else None,
            sigma,
            loss_weight(sigma, self.model.schedule, self.config.objective),
        )

    def names(self, indices: range) -> list[str]:
        """File and row of these images of the run, for messages."""
        samples = self.plan.draw(indices).samples.tolist()
        return [self.dataset.source.name(self.dataset.kept[self.samples[sample]]) for sample in samples]

    def ahead(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps `first` to `last` - 1, each assembled in a thread while the one before is computed."""
        with ThreadPoolExecutor(1, "batches") as pool:
            coming = pool.submit(self.assemble, first) if first < last else None
            for step in range(first, last):
                assert coming is not None
                batch = coming.result()
                coming = pool.submit(self.assemble, step + 1) if step + 1 < last else None
                yield batch


def encode(batch: Batch, model: DiffusionModel, device: torch.device) -> Tensor:
    """x0 [B, C, H, W], float32, in the network's space."""
    images = batch.images.to(device)
    if isinstance(model.codec, LatentCodec):
        return model.codec.encode(images, batch.latent_noise)
    return model.codec.encode(images)
