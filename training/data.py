"""The samples that a run trains on: the look at every one of them before the first step, and their pixels during it.

Shape letters: B batch, C channels (1 grey, 3 sRGB), H W image, h w what is trained on. Pixels are uint8.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_unet.checkpoint import write_bytes
from diffusion_unet.errors import InputError

from .buckets import assign, bucket_sizes, cover
from .config import DataConfig
from .decoding import THREADS
from .plan import held_out_split
from .sources import Source, open_source

LISTED = 20  # bad samples that are printed; the file has all of them
INDEX_FORMAT = 2

# What the network is told of an image besides its noise level.
Told = Literal["caption", "label", "nothing"]
Watch = Callable[[Iterator[Any], int], Iterator[Any]]


class Bad(NamedTuple):
    name: str
    reason: str


class Look(NamedTuple):
    """What one sample turned out to be."""

    stamp: str  # changes with the sample
    size: tuple[int, int]  # (W, H), upright
    values: tuple[int, int, int]  # number of pixel values 0 to 255, their sum, the sum of their squares
    digest: str  # of pixels and captions, hex; in a quick look of stamp and captions
    reason: str | None = None  # why it cannot be used


@dataclass(frozen=True)
class Instances:
    """Images of one subject followed by images of its class (DreamBooth's prior preservation)."""

    instances: Source
    classes: Source
    first: int  # of the instances, so many are used

    def __len__(self) -> int:
        return self.first + len(self.classes)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(index: int, *more: Any, **named: Any) -> Any:
            source, place = (self.instances, index) if index < self.first else (self.classes, index - self.first)
            return getattr(source, name)(place, *more, **named)

        if name not in ("captions", "image", "original", "pixels", "label", "name", "size", "stamp"):
            raise AttributeError(name)
        return ask


def open_data(config: DataConfig, channels: int) -> Source:
    """All samples that the settings name. Raises InputError."""
    source = open_source(config, channels)
    if config.class_data_dir is None:
        return source
    kept = ("resolution", "background", "cache_dir")
    of_class = DataConfig(
        train_data_dir=config.class_data_dir,
        instance_prompt=config.class_prompt,
        **{name: getattr(config, name) for name in kept},
    )
    try:
        first = min(len(source), config.max_train_samples or len(source))
        return Instances(source, open_source(of_class, channels), first)
    except InputError as error:
        message = str(error).replace("data.train_data_dir", "data.class_data_dir")
        raise InputError(message) from None


@dataclass
class Dataset:
    """The usable samples of a source, at the sizes of training."""

    source: Source
    channels: int
    buckets: Sequence[tuple[int, int]]  # (h, w) of each; one square one without aspect_buckets
    kept: list[int]  # indices into the source
    captions: list[list[str]]  # of each kept sample
    sizes: list[tuple[int, int]]  # (W, H) of each
    bucket: list[int]  # of each
    digests: list[str]  # of each
    bad: list[Bad]
    mean: float  # of all pixels, in [-1, 1]; NaN after a quick look
    std: float
    fingerprint: str  # sha256 of pixels and captions
    instances: int  # kept samples that are not of class_data_dir; these come first
    room: int  # bytes of decoded images that may still be kept
    cached: dict[int, NDArray[np.uint8]] = field(default_factory=dict, repr=False)  # kept sample -> [H, W, C]
    _lock: Any = field(default_factory=Lock, repr=False)

    def __len__(self) -> int:
        return len(self.kept)

    def cover(self, sample: int) -> tuple[int, int]:
        """(H, W) that the sample is scaled to before it is cropped."""
        return cover(self.sizes[sample], self.buckets[self.bucket[sample]])

    def image(self, sample: int) -> NDArray[np.uint8]:
        """[H, W, C], covering its bucket."""
        found = self.cached.get(sample)
        if found is None:
            found = self._pixels(sample)
            self.keep(sample, found)
        return found

    def keep(self, sample: int, image: NDArray[np.uint8]) -> None:
        """Remembers a decoded image while there is room."""
        with self._lock:
            if image.nbytes <= self.room:
                self.room -= image.nbytes
                self.cached[sample] = image

    def images(self, samples: Sequence[int], crop: Tensor, flip: Tensor) -> Tensor:
        """[B, h, w, C]: samples of one bucket, cropped at `crop` [B, 2] in [0, 1) and mirrored where `flip` [B]."""
        return self._cut(self._decoded(self.image, samples), samples, crop, flip)

    def originals(self, samples: Sequence[int], crop: Tensor, flip: Tensor) -> Tensor:
        """As `images`, of the pictures that are to be changed into them."""
        original = partial(self._pixels, original=True)
        return self._cut(self._decoded(original, samples), samples, crop, flip)

    def _decoded(
        self, image: Callable[[int], NDArray[np.uint8]], samples: Sequence[int]
    ) -> Sequence[NDArray[np.uint8]]:
        """In parallel, where anything is to be decoded."""
        if all(sample in self.cached for sample in samples):
            return [self.cached[sample] for sample in samples]
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(image, samples))

    def boxes(self, samples: Sequence[int], crop: Tensor, flip: Tensor) -> list[tuple[int, int]]:
        """(top, left) of each crop, in the scaled and maybe mirrored picture."""
        corners = []
        for sample, place, mirrored in zip(samples, crop.tolist(), flip.tolist(), strict=True):
            height, width = self.buckets[self.bucket[sample]]
            full = self.cover(sample)
            top, left = _corner(full, (height, width), place)
            corners.append((top, full[1] - width - left if mirrored else left))
        return corners

    def caption(self, sample: int, u: float) -> str:
        """One of the sample's captions, by u in [0, 1)."""
        captions = self.captions[sample]
        return captions[int(u * len(captions))]

    def split(self, seed: int, held_out: int) -> tuple[list[int], list[int]]:
        """Samples to train on, and samples kept from it. Raises InputError where none would be left."""
        if held_out >= self.instances:
            raise InputError(f"data.held_out: {held_out} of {self.instances} usable images leave none to train on")
        train, kept = held_out_split(seed, self.instances, held_out)
        return [*train, *range(self.instances, len(self))], kept

    def _pixels(self, sample: int, original: bool = False) -> NDArray[np.uint8]:
        size = self.cover(sample)
        return self.source.pixels(self.kept[sample], self.channels, lambda _: size, original=original)

    def _cut(self, whole: Sequence[NDArray[np.uint8]], samples: Sequence[int], crop: Tensor, flip: Tensor) -> Tensor:
        height, width = self.buckets[self.bucket[samples[0]]]
        batch = np.empty((len(samples), height, width, self.channels), dtype=np.uint8)
        for row, (image, place, mirrored) in enumerate(zip(whole, crop.tolist(), flip.tolist(), strict=True)):
            top, left = _corner(image.shape[:2], (height, width), place)
            cut = image[top : top + height, left : left + width]
            batch[row] = cut[:, ::-1] if mirrored else cut
        return torch.from_numpy(batch)


def _corner(full: tuple[int, ...], size: tuple[int, int], place: Sequence[float]) -> tuple[int, int]:
    top, left = (int(u * (whole - part + 1)) for u, whole, part in zip(place, full, size, strict=True))
    return top, left


def sizes_of(config: DataConfig) -> list[tuple[int, int]]:
    """(h, w) of the buckets that the settings ask for. Raises InputError."""
    if not config.aspect_buckets:
        return [(config.resolution, config.resolution)]
    return bucket_sizes(config.resolution, config.bucket_step, config.max_aspect)


def inspect(
    source: Source,
    config: DataConfig,
    channels: int,
    *,
    told: Told = "caption",
    index: Path | None = None,
    watch: Watch | None = None,
    write: bool = True,
) -> Dataset:
    """Looks at every sample once, in parallel, and sets apart what cannot be used; `watch` may show the progress.

    index: a file that keeps what was seen, so that only samples that have changed since are decoded again; written
    where `write`. Whether so many bad ones are bearable is for `too_many_bad` to say. Raises InputError, SaveError."""
    buckets = sizes_of(config)
    dataset = Dataset(
        source, channels, buckets, [], [], [], [], [], [], 0.0, 0.0, "", 0, config.cache_in_memory * 2**20
    )
    known = read_index(index, config, channels, told)
    count = min(len(source), config.max_train_samples or len(source))
    instances = count
    if isinstance(source, Instances):
        count, instances = len(source), source.first
    looked: list[Look] = []
    look_at = partial(_look, source, config, channels, told, buckets, known)
    # Where the look is broken off, what has not begun does not begin.
    with ThreadPoolExecutor(THREADS) as pool, closing(pool.map(look_at, range(count))) as looks:  # type: ignore[type-var]
        for number, (look, captions, image) in enumerate(watch(looks, count) if watch else looks):
            looked.append(look)
            if look.reason is not None:
                dataset.bad.append(Bad(source.name(number), look.reason))
                continue
            if image is not None:
                dataset.keep(len(dataset.kept), image)
            dataset.kept.append(number)
            dataset.captions.append(captions)
            dataset.sizes.append(look.size)
            dataset.digests.append(look.digest)
            dataset.instances += number < instances
    dataset.bucket = assign(dataset.sizes, buckets)
    whole = [look for look in looked if look.reason is None]
    dataset.mean, dataset.std = _moments([look.values for look in whole])
    dataset.fingerprint = hashlib.sha256("".join(dataset.digests).encode()).hexdigest()
    if index is not None and write and any(look.stamp not in known for look in looked):
        _write_index(index, config, channels, told, looked)
    return dataset


def _look(
    source: Source,
    config: DataConfig,
    channels: int,
    told: Told,
    buckets: Sequence[tuple[int, int]],
    known: dict[str, Look],
    index: int,
) -> tuple[Look, list[str], NDArray[np.uint8] | None]:
    """What the sample is, its captions, and its pixels where they had to be decoded."""
    stamp, size = "", (0, 0)

    def wanted(found: tuple[int, int]) -> tuple[int, int]:
        nonlocal size
        size = found
        if min(size) < config.min_size:
            raise InputError(f"{size[0]}x{size[1]} pixels, and data.min_size is {config.min_size}")
        return cover(size, buckets[assign([size], buckets)[0]])

    try:
        stamp = f"{source.name(index)} {source.stamp(index)}"
        if (found := known.get(stamp)) is not None:
            return found, [] if found.reason else texts(source, told, index), None
        captions = texts(source, told, index)
        if config.look == "quick":
            wanted(source.size(index))
            digest = hashlib.sha256(json.dumps([captions, stamp]).encode()).hexdigest()
            return Look(stamp, size, (0, 0, 0), digest), captions, None
        image = source.pixels(index, channels, wanted)
        fitting, original = (image.shape[0], image.shape[1]), None
        if config.original_image_column is not None:
            original = source.pixels(index, channels, lambda _: fitting, original=True)
    except InputError as error:
        return Look(stamp, size, (0, 0, 0), "", str(error)), [], None
    flat = image.reshape(-1)
    content = hashlib.sha256(json.dumps([captions, image.shape]).encode())
    content.update(flat.data)
    content.update(b"" if original is None else original.reshape(-1).data)
    squares = np.einsum("i,i", flat, flat, dtype=np.int64)
    values = (flat.size, int(flat.sum(dtype=np.int64)), int(squares))
    return Look(stamp, size, values, content.hexdigest()), captions, image


def texts(source: Source, told: Told, index: int) -> list[str]:
    """What the network may be told of the sample, in words."""
    if told == "caption":
        return source.captions(index)
    return [source.label(index)] if told == "label" else [""]


def _index_header(config: DataConfig, channels: int, told: Told) -> str:
    """What a look depends on besides the sample."""
    names = ("resolution", "aspect_buckets", "bucket_step", "max_aspect", "background", "look", "min_size")
    return json.dumps([INDEX_FORMAT, channels, told, *(getattr(config, name) for name in names)])


def read_index(path: Path | None, config: DataConfig, channels: int, told: Told) -> dict[str, Look]:
    """What was seen before, by stamp; nothing where the file is another's, or damaged: then all is looked at anew."""
    if path is None or not path.is_file():
        return {}
    header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if header != _index_header(config, channels, told):
        return {}
    try:
        rows = [json.loads(line) for line in lines]
        looks = [Look(stamp, tuple(size), tuple(values), digest, why) for stamp, size, values, digest, why in rows]
    except (ValueError, TypeError):
        return {}
    return {look.stamp: look for look in looks}


def _write_index(path: Path, config: DataConfig, channels: int, told: Told, looks: Sequence[Look]) -> None:
    lines = [_index_header(config, channels, told), *(json.dumps(look) for look in looks if look.stamp)]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def too_many_bad(dataset: Dataset, config: DataConfig) -> str | None:
    """Why the run must not begin, in one line; None where it may."""
    total = len(dataset) + len(dataset.bad)
    if not dataset.instances or len(dataset.bad) > config.max_bad_fraction * total:
        return (
            f"{len(dataset.bad)} of {total} samples of {config.train_data_dir or config.dataset_name} cannot be used,"
            f" more than data.max_bad_fraction ({config.max_bad_fraction:g}) allows: mend them, or take them out"
        )
    return None


def describe_bad(bad: Sequence[Bad], file: Path) -> list[str]:
    """Lines for a person: the first bad samples, and where the whole list is."""
    lines = [reason if name in reason else f"{name}: {reason}" for name, reason in bad[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"... and {len(bad) - LISTED} more, all of them in {file}")
    return lines


def _moments(values: Sequence[tuple[int, int, int]]) -> tuple[float, float]:
    """Mean and standard deviation in [-1, 1] of all pixels; exact but for the last step. NaN where none was decoded."""
    total, first, second = (sum(column) for column in zip(*values, strict=True)) if values else (0, 0, 0)
    if total == 0:
        return float("nan"), float("nan")
    variance = (second * total - first * first) / total**2
    return first / total / 127.5 - 1, variance**0.5 / 127.5
