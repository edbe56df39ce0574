"""The batches of a run: what each optimizer step computes with, drawn at the addresses of its images."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_unet.codec import LatentCodec
from diffusion_unet.conditioning import size_ids
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.random import Purpose, normal, permutation, uniform

from .cache import Store
from .config import Config
from .data import Dataset
from .objective import loss_weight, noise_levels, offset_noise
from .plan import Draws, Plan, share, step_indices

# `draw` of the numbers of purpose NOISE besides the noise itself.
POSTERIOR, OFFSET, MASKED_POSTERIOR = 1, 2, 3
HELD_OUT = 2**62  # index of the first held-out image: no run gets that far
SEEN = 2**63  # index of the first training image that is looked at in the same way
GREY = 128  # what stands in the hole of a picture: 0 in [-1, 1], or nearly
WHOLE_MASK = 0.25  # share of inpainting masks that hide the whole picture


@dataclass(frozen=True)
class Batch:
    """What one process computes of one step, on the CPU; [B, ...] each, None where the run does not use it."""

    indices: range  # global image indices
    noise: Tensor  # float32 [B, C, H, W], of the network's space
    sigma: Tensor  # float64 [B]
    weight: Tensor  # float64 [B], of the squared error
    images: Tensor | None = None  # uint8 [B, h, w, C]
    moments: Tensor | None = None  # float32 [B, 2C, H, W], of an autoencoder, in the place of images
    latent_noise: Tensor | None = None  # as noise, for an autoencoder
    ids: Tensor | None = None  # tokens int64 [B, L], or [B, 2, L] for two encoders, or classes [B, 1]
    context: Tensor | None = None  # [B, L, D], encoded text in the place of ids
    pooled: Tensor | None = None  # [B, P]
    time_ids: Tensor | None = None  # [B, 6], sizes and crop (SDXL)
    originals: Tensor | None = None  # uint8 [B, h, w, C], pictures to be changed
    seen: Tensor | None = None  # bool [B], whether the network is shown them
    masks: Tensor | None = None  # bool [B, 1, h, w], true where a picture has its hole
    masked_noise: Tensor | None = None  # as noise, for the autoencoder's latents of the rest

    def part(self, number: int, parts: int) -> "Batch":
        """Micro-batch `number` of `parts`, neighbouring images."""
        indices = share(self.indices, number, parts)
        start = indices.start - self.indices.start
        rows = slice(start, start + len(indices))
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, indices=indices, **tensors)


class Batches:
    """Batches of process `rank` of `world`."""

    def __init__(self, config: Config, dataset: Dataset, model: DiffusionModel, rank: int = 0, world: int = 1):
        self.config, self.dataset, self.model = config, dataset, model
        self.rank, self.world = rank, world
        codec, data = model.codec, config.data
        self.channels = codec.latent_channels if isinstance(codec, LatentCodec) else codec.channels
        for height, width in dataset.buckets:
            if height % codec.scale_factor or width % codec.scale_factor:
                raise InputError(
                    f"data.{'bucket_step' if data.aspect_buckets else 'resolution'}: {width}x{height} is no multiple of"
                    f" the autoencoder's {codec.scale_factor}"
                )
        self.samples, self.held_out = dataset.split(config.train.seed, config.data.held_out)
        trained = [sample for sample in self.samples if sample < dataset.instances]
        members = [[sample for sample in trained if dataset.bucket[sample] == b] for b in range(len(dataset.buckets))]
        if data.class_data_dir is not None and len(trained) == len(self.samples):
            raise InputError(f"data.class_data_dir: no image of {data.class_data_dir} can be used")
        self.plan = Plan(
            config.train.seed,
            config.train.train_batch_size,
            tuple(members),
            self.samples[len(trained) :],
            data.center_crop,
            data.random_flip,
            config.objective.stratified,
        )
        self.latents: Store | None = None  # of moments; entries as `entry` numbers them
        self.texts: tuple[Store, dict[str, int]] | None = None  # encoded captions, and where each is
        self._coming: Future[Batch] | None = None

    def assemble(self, step: int) -> Batch:
        """This process's images of optimizer step `step`, counted from 0."""
        indices = step_indices(step, self.config.train.train_batch_size, self.rank, self.world)
        draws = self.plan.draw(indices)
        chosen = draws.samples.tolist()
        return self._batch(indices, chosen, draws, self._captions(chosen, draws))

    def held_out_batches(self, limit: int) -> list[Batch]:
        """`limit` held-out images, one batch for each of their sizes."""
        return self._fixed(self._some(self.held_out, limit), HELD_OUT)

    def training_batches(self, limit: int) -> list[Batch]:
        """As `held_out_batches`, of images that are trained on."""
        trained = [sample for sample in self.samples if sample < self.dataset.instances]
        return self._fixed(self._some(trained, limit), SEEN)

    def _some(self, samples: Sequence[int], limit: int) -> list[int]:
        """From all over a collection, which may be in the order of what it shows."""
        order = permutation(self.config.train.seed, 2**64 - 2, len(samples)).tolist()
        return sorted(samples[place] for place in order[:limit])

    def _fixed(self, samples: Sequence[int], first: int) -> list[Batch]:
        """Cropped in the middle, with their first caption and noise of their own."""
        batches = []
        for bucket in sorted({self.dataset.bucket[sample] for sample in samples}):
            chosen = [sample for sample in samples if self.dataset.bucket[sample] == bucket]
            indices = range(first, first + len(chosen))
            first = indices.stop
            level = torch.full((len(chosen),), 0.5, dtype=torch.float64)
            still, middle = torch.zeros(len(chosen), dtype=torch.bool), torch.full((len(chosen), 2), 0.5)
            draws = Draws(indices, torch.tensor(chosen), middle, still, level, torch.ones_like(level), level)
            captions = [self.dataset.captions[sample][0] for sample in chosen]
            batches.append(self._batch(indices, chosen, draws, captions, fresh=True))
        return batches

    def _captions(self, chosen: Sequence[int], draws: Draws) -> list[str]:
        data, captions = self.config.data, []
        for index, sample, u, drop in zip(
            draws.indices, chosen, draws.caption.tolist(), draws.drop.tolist(), strict=True
        ):
            caption = "" if drop < data.caption_dropout else self.dataset.caption(sample, u)
            captions.append(self._shuffled(caption, index) if data.shuffle_tags else caption)
        return captions

    def _shuffled(self, caption: str, index: int) -> str:
        data = self.config.data
        tags = [tag.strip() for tag in caption.split(data.tag_separator) if tag.strip()]
        kept, moved = tags[: data.keep_tags], tags[data.keep_tags :]
        moved = [moved[place] for place in self.plan.order(index, len(moved))] if moved else []
        return f"{data.tag_separator.strip()} ".join([*kept, *moved])

    def _batch(
        self, indices: range, chosen: Sequence[int], draws: Draws, captions: list[str], *, fresh: bool = False
    ) -> Batch:
        """fresh: take the pixels even where their moments are kept (held-out images are not)."""
        config, dataset, seed = self.config, self.dataset, self.config.train.seed
        height, width = dataset.buckets[dataset.bucket[chosen[0]]]
        factor = self.model.codec.scale_factor
        shape = (self.channels, height // factor, width // factor)

        def noise(draw: int) -> Tensor:
            return normal(seed, Purpose.NOISE, indices, shape, draw=draw)

        of_image = noise(0)
        if config.objective.noise_offset:
            offsets = normal(seed, Purpose.NOISE, indices, (self.channels,), draw=OFFSET)
            of_image = offset_noise(of_image, offsets, config.objective.noise_offset)
        sigma = noise_levels(draws.level, self.model.schedule, config.objective, height * width)
        weight = loss_weight(sigma, self.model.schedule, config.objective)
        fields: dict[str, Tensor] = self._text(captions)
        if isinstance(self.model.codec, LatentCodec):
            fields["latent_noise"] = noise(POSTERIOR)
        crop = draws.crop
        if self.latents is not None and not fresh:
            crop, variants = self.kept_crops(chosen, draws)
            flips = draws.flip.tolist()
            entries = [self.entry(*which) for which in zip(chosen, variants, flips, strict=True)]
            fields["moments"] = torch.stack([row["moments"] for row in self.latents.rows(entries)])
        else:
            fields["images"] = dataset.images(chosen, crop, draws.flip)
        if self.model.unet.config.addition_embed_type == "text_time":
            fields["time_ids"] = self._sizes(chosen, crop, draws.flip)
        if config.model.task == "inpaint":
            fields["masks"] = self._masks(indices, height, width)
            fields["masked_noise"] = noise(MASKED_POSTERIOR)
        if config.model.task == "instruct-pix2pix":
            fields["originals"] = dataset.originals(chosen, crop, draws.flip)
            # Brooks, Holynski, Efros 2023 (arXiv:2211.09800), section 3.2.1: the text, the picture or both are left
            # out, each as often.
            half = config.data.caption_dropout / 2
            fields["seen"] = (draws.drop < half) | (draws.drop >= 3 * half)
        if self.plan.classes:
            # The mean is taken over images of the instance alone, half of the step.
            of_class = torch.tensor([sample >= dataset.instances for sample in chosen])
            weight = weight * torch.where(of_class, 2 * config.data.prior_loss_weight, 2.0)
        return Batch(indices, of_image, sigma, weight, **fields)

    def _text(self, captions: list[str]) -> dict[str, Tensor]:
        if self.model.text is None:
            return {}
        if self.texts is None:
            return {"ids": self.model.text.tokenize(captions)[0]}
        store, places = self.texts
        rows = store.rows([places[caption] for caption in captions])
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _sizes(self, chosen: Sequence[int], crop: Tensor, flip: Tensor) -> Tensor:
        corners = self.dataset.boxes(chosen, crop, flip)
        rows = []
        for sample, corner in zip(chosen, corners, strict=True):
            width, height = self.dataset.sizes[sample]
            rows.append(size_ids((height, width), corner, self.dataset.buckets[self.dataset.bucket[sample]]))
        return torch.stack(rows)

    def _masks(self, indices: range, height: int, width: int) -> Tensor:
        """A rectangle of any size at any place, or all of the picture; bool [B, 1, h, w]."""
        masks = torch.zeros(len(indices), 1, height, width, dtype=torch.bool)
        draws = uniform(self.config.train.seed, Purpose.MASK, indices, 5).tolist()
        for mask, (whole, tall, wide, down, right) in zip(masks, draws, strict=True):
            sides = (height, width) if whole < WHOLE_MASK else (1 + int(tall * height), 1 + int(wide * width))
            top, left = int(down * (height - sides[0] + 1)), int(right * (width - sides[1] + 1))
            mask[:, top : top + sides[0], left : left + sides[1]] = True
        return masks

    # ---- what a cache of latents holds: some crops of each sample, mirrored too where that is asked for ----

    @property
    def entries(self) -> int:
        """Entries of the cache."""
        return len(self.dataset) * self._variants

    @property
    def _variants(self) -> int:
        return self.config.data.cache_crops * (1 + self.config.data.random_flip)

    def entry(self, sample: int, crop: int, flip: bool) -> int:
        """Which entry of the cache holds this crop of a sample."""
        return (sample * self.config.data.cache_crops + crop) * (1 + self.config.data.random_flip) + flip

    def kept_crops(self, chosen: Sequence[int], draws: Draws) -> tuple[Tensor, list[int]]:
        """Of each image the place [B, 2] and the number of the kept crop that it takes."""
        if self.config.data.center_crop:
            return draws.crop, [0] * len(chosen)
        numbers = [int(u * self.config.data.cache_crops) for u in draws.crop[:, 0].tolist()]
        return self._places(chosen, numbers), numbers

    def _places(self, chosen: Sequence[int], numbers: Sequence[int]) -> Tensor:
        seed = self.config.train.seed
        pairs = zip(chosen, numbers, strict=True)
        return torch.cat([uniform(seed, Purpose.CROP, sample, 2, draw=1 + number) for sample, number in pairs])

    def pixels(self, entries: Sequence[int]) -> Tensor:
        """The pixels [B, h, w, C] of entries of the cache, all of one bucket."""
        whole, flips = zip(*(divmod(entry, 1 + self.config.data.random_flip) for entry in entries), strict=True)
        chosen, numbers = zip(*(divmod(one, self.config.data.cache_crops) for one in whole), strict=True)
        middle = torch.full((len(entries), 2), 0.5, dtype=torch.float64)
        crop = middle if self.config.data.center_crop else self._places(chosen, numbers)
        return self.dataset.images(chosen, crop, torch.tensor(flips, dtype=torch.bool))

    def bucket_of(self, entry: int) -> int:
        """The bucket of an entry of the cache."""
        return self.dataset.bucket[entry // self._variants]

    # ---- the way through a run ----

    def names(self, indices: range) -> list[str]:
        """File and row of these images of the run, for messages."""
        samples = self.plan.draw(indices).samples.tolist()
        return [self.dataset.source.name(self.dataset.kept[sample]) for sample in samples]

    def ahead(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps `first` to `last` - 1, each assembled in a thread while the one before is computed."""
        with ThreadPoolExecutor(1, "batches") as pool:
            self._coming = pool.submit(self.assemble, first) if first < last else None
            for step in range(first, last):
                assert self._coming is not None
                batch = self._coming.result()
                self._coming = pool.submit(self.assemble, step + 1) if step + 1 < last else None
                yield batch

    def fault(self) -> BaseException | None:
        """Why the batch after the one that `ahead` gave last cannot be had; waits until that is known."""
        return None if self._coming is None else self._coming.exception()


def encode(batch: Batch, model: DiffusionModel, device: torch.device) -> Tensor:
    """x0 [B, C, H, W], float32, in the network's space."""
    codec = model.codec
    if not isinstance(codec, LatentCodec):
        assert batch.images is not None
        return codec.encode(batch.images.to(device))
    if batch.moments is not None:
        return codec.sample(batch.moments.to(device), batch.latent_noise)
    assert batch.images is not None
    return codec.encode(batch.images.to(device), batch.latent_noise)


def told(batch: Batch, model: DiffusionModel, device: torch.device) -> dict[str, Tensor]:
    """What else the network is given, by the names of `Network.forward`: text, sizes, and further channels."""
    names = ("ids", "context", "pooled", "time_ids")
    given = {name: value.to(device) for name in names if (value := getattr(batch, name)) is not None}
    codec = model.codec
    if batch.masks is not None and isinstance(codec, LatentCodec):
        assert batch.images is not None
        hole = batch.masks.to(device)
        rest = batch.images.to(device).masked_fill(hole.movedim(1, -1), GREY)
        small = F.interpolate(hole.float(), scale_factor=1 / codec.scale_factor)
        given["extra"] = torch.cat([small, codec.encode(rest, batch.masked_noise)], dim=1)
    if batch.originals is not None and isinstance(codec, LatentCodec):
        assert batch.seen is not None
        # Not scaled as the latents are, nor drawn from their distribution: so the published models have it.
        mean = codec.moments(batch.originals.to(device)).chunk(2, dim=1)[0]
        given["extra"] = mean * batch.seen.to(mean).view(-1, 1, 1, 1)
    return given
