"""Pictures in and out: correct pixels from any file, PNG with its record, labelled grids.

Arrays are uint8 [H, W, C], C = 1 (grey) or 3 (sRGB).
"""

import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from .errors import InputError
from .solver_names import a1111_sampler

T = TypeVar("T")

# Named, so that no file reaches a decoder that runs another program (EPS) or was not meant for pictures at all.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 1 << 27  # 128 Mi; a header that promises more is a decompression bomb
WHITE = (255, 255, 255)
RECORD = "diffusion_unet"  # key of the PNG text that holds the record as JSON

# EXIF 2.32, tag 0x0112: what turns the stored rows and columns upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
WHITE_IS_ZERO = 0  # TIFF 6.0, PhotometricInterpretation
_A1111_SCHEDULES = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta", "simple": "Simple"}
_A1111_RNGS = {"torch": "CPU", "nv": "NV"}


def open_image(
    source: Path | str | bytes, channels: int = 3, background: tuple[int, int, int] = WHITE, *, name: str | None = None
) -> Image.Image:
    """The picture as a person sees it: mode "RGB" (3 channels) or "L" (1), upright, sRGB.

    The EXIF orientation is applied, an ICC profile converted to sRGB (one that is damaged or of another colour space is
    passed over, as browsers do), transparency composited over `background`, 16 bits scaled to 8.

    source: a path, or the bytes of a file, which errors then call `name`. Raises InputError, naming the file, when it
    is missing, not decodable, truncated, animated, or larger than MAX_PIXELS.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    mode = "RGB" if channels == 3 else "L"
    if isinstance(source, bytes):
        return _guarded(name, lambda: _in_mode(_decode(io.BytesIO(source), background), mode))
    with _opened(Path(source), name) as file:
        return _guarded(name, lambda: _in_mode(_decode(file, background), mode))


def image_size(source: Path | str | bytes, *, name: str | None = None) -> tuple[int, int]:
    """(W, H) of the picture that `open_image` gives, from the header of its file: no pixel is decoded.

    Arguments and errors as of `open_image`, but that damage after the header passes unseen."""
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    if isinstance(source, bytes):
        return _guarded(name, lambda: _measure(io.BytesIO(source)))
    with _opened(Path(source), name) as file:
        return _guarded(name, lambda: _measure(file))


def _guarded(name: str, work: Callable[[], T]) -> T:
    """What `work` returns; what decoders raise, as an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # a fault is raised below, the rest is not for a person
            return work()
    except Image.DecompressionBombError:
        raise InputError(f"{name} has more than {MAX_PIXELS} pixels: make it smaller") from None
    except Exception as error:  # decoders raise nearly everything on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"no {', '.join(FORMATS)} file"
        raise InputError(f"{name} cannot be used: {reason[:200]}") from error


def open_png(path: Path) -> tuple[Image.Image, dict[str, str]]:
    """A PNG as it is stored, nothing of it converted, and its texts. Raises InputError, naming the file."""
    with _opened(path, str(path)) as file:
        return _guarded(str(path), lambda: _png(file))


def _png(file: BinaryIO) -> tuple[Image.Image, dict[str, str]]:
    try:
        image = Image.open(file, formats=["PNG"])
    except UnidentifiedImageError:
        raise ValueError("no PNG file, and other pictures carry no record") from None
    with image:
        _check_header(image)
        image.load()
        return image.copy(), dict(image.text)  # type: ignore[attr-defined]


def to_array(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """The picture resized to cover `size` (Lanczos, antialiased), and what sticks out cropped away on both sides.

    size: side of a square, or (H, W). Returns uint8 [H, W, C]; C = 1 for mode "L", 3 for "RGB". Raises InputError.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise InputError(f"a picture of {width}x{height} cannot be: sizes are 1 or more")
    scale = max(height / image.height, width / image.width)
    full = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    top, left = round((full[0] - height) / 2), round((full[1] - width) / 2)
    # The part that is kept, in the picture's own pixels: a strip of 1x30000 is never enlarged as a whole.
    y, x = image.height / full[0], image.width / full[1]
    box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    array = np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    return array.reshape(height, width, -1)  # [H, W, C]


def to_image(array: Any) -> Image.Image:
    """uint8 [H, W, C] or [H, W], numpy or a CPU tensor -> a picture of mode "L" or "RGB"."""
    pixels = np.asarray(array)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise InputError(f"an array of {pixels.dtype} {pixels.shape} is no picture: uint8 [H, W, 1 or 3] is")
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def save_png(path: Path | str, image: Image.Image | np.ndarray, record: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG whole or not at all, its record as JSON text under RECORD and as A1111's `parameters`.

    record: how the picture was drawn, anything JSON holds, see `parameters` for what is spelled out there; None takes
    both texts from `image.info`, where a picture that was drawn has them. Raises SaveError.
    """
    picture = image if isinstance(image, Image.Image) else to_image(image)
    info = PngImagePlugin.PngInfo()
    if record is None:
        for key in (RECORD, "parameters"):
            if isinstance(picture.info.get(key), str):
                info.add_text(key, picture.info[key])
    else:
        info.add_text(RECORD, json.dumps(record, allow_nan=False))
        if "prompt" in record:
            info.add_text("parameters", parameters(record, picture.size))
    from .checkpoint import write_bytes  # with torch, which processes that only open pictures do not import

    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=info)
    write_bytes(Path(path), file.getvalue())


def first_free(folder: Path) -> int:
    """The number after those of all prompts that have a picture in the folder."""
    found = [re.fullmatch(r"([0-9]{5,9})-[0-9]+\.png", file.name) for file in folder.glob("*.png")]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def parameters(record: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The record of a picture of `size` (W, H) in the words of A1111's web interface, which other programs read too."""
    solver, varied = record.get("solver"), record.get("variation_strength")
    drawn_by = (record.get("versions") or {}).get("diffusion_unet")
    values = {
        "Steps": record.get("steps"),
        "Sampler": solver and a1111_sampler(str(solver)),
        "Schedule type": _A1111_SCHEDULES.get(str(record.get("spacing"))),
        "CFG scale": record.get("guidance_scale"),
        "Seed": record.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": record.get("model_hash") and str(record["model_hash"])[:10],
        "Model": record.get("model"),
        "Variation seed": record.get("variation_seed") if varied else None,
        "Variation seed strength": varied or None,
        "Denoising strength": record.get("strength"),
        "RNG": _A1111_RNGS.get(str(record.get("rng"))),
        "Version": drawn_by and f"diffusion-unet {drawn_by}",
    }
    lines = [str(record["prompt"])]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in values.items() if value is not None))
    text = "\n".join(lines).replace("\0", " ")
    return text.encode("utf-8", "replace").decode()


def _quoted(value: Any) -> str:
    """A value as A1111 tells it from those beside it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(letter in text for letter in ",:\n") else text


def grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int, scale: int | None = None) -> Image.Image:
    """Pictures of one size in rows of `columns`, small ones enlarged, on white, with labels that can be read.

    labels: one for each picture, written beneath it, or one for each row, written left of it.
    scale: whole factor of enlargement; None takes one that makes the longer side 96 pixels or more.
    """
    rows = -(-len(images) // columns) if columns > 0 else 0
    if not images or rows == 0 or len(labels) not in (len(images), rows):
        raise InputError(
            f"a grid of {len(images)} pictures, {len(labels)} labels, {columns} columns: label pictures or rows"
        )
    if len({image.size for image in images}) > 1:
        raise InputError("a grid shows pictures of one size: these differ")
    width, height = images[0].size
    scale = scale or -(-96 // max(width, height))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(size=max(16, width // 9))
    beneath = len(labels) == len(images)
    texts = [_wrap(label, font, width if beneath else 260) for label in labels]
    spans = [_text_size(text, font) for text in texts]
    gap = max(4, width // 16)
    margin = gap if beneath else max(w for w, _ in spans) + 3 * gap  # left of the pictures
    below = max(h for _, h in spans) + gap if beneath else 0
    pitch = height + below + gap
    sheet = Image.new("RGB", (margin + columns * (width + gap), gap + rows * pitch), WHITE)
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = margin + i % columns * (width + gap), gap + i // columns * pitch
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (x, y))
        if beneath:
            draw.multiline_text(
                (x + width // 2, y + height + gap // 2), texts[i], "black", font, anchor="ma", align="center"
            )
        elif i % columns == 0:
            middle = y + (height - spans[i // columns][1]) // 2
            draw.multiline_text(
                (margin - 2 * gap, middle), texts[i // columns], "black", font, anchor="ra", align="right"
            )
    return sheet


def _text_size(text: str, font: Any) -> tuple[int, int]:
    """Width and height in pixels of a text of several lines."""
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return round(right - min(left, 0)), round(bottom - min(top, 0))


def _wrap(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[BinaryIO]:
    if not path.is_file():  # nor a pipe, which would be waited on for ever
        raise InputError(f"{name} is no file")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None


def _decode(file: BinaryIO, background: tuple[int, int, int]) -> Image.Image:
    """Mode "RGB". Raises whatever the decoders raise."""
    picture, orientation = _as_stored(file, background)
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _as_stored(file: BinaryIO, background: tuple[int, int, int]) -> tuple[Image.Image, int]:
    """Mode "RGB", before it is turned by its orientation."""
    with Image.open(file, formats=FORMATS) as image:
        _check_header(image)
        _clear_grey(image)
        image.load()
        orientation = _orientation(image)
        base, alpha = _split(image)
        base = _to_srgb(base, image.info.get("icc_profile"))
        if alpha is not None:
            under = Image.new("RGB", base.size, background)
            under.paste(base, mask=alpha)
            base = under
        return base, orientation


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Not copied where it is in that mode: a large picture and its copy may be more than there is memory for."""
    return image if image.mode == mode else image.convert(mode)


def _measure(file: BinaryIO) -> tuple[int, int]:
    """(W, H), upright. Raises whatever the decoders raise."""
    with Image.open(file, formats=FORMATS) as image:
        _check_header(image)
        width, height = image.size
        if image.format == "TIFF":  # whose size Pillow gives upright or as it is stored, by its version
            tags = image.tag_v2  # type: ignore[attr-defined]
            width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
        orientation = _orientation_behind(file) if image.format == "PNG" else _orientation(image)
        return (height, width) if orientation in _SIDEWAYS else (width, height)


def _check_header(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a phone's MPO has a preview behind its picture
        raise ValueError(f"it holds {image.n_frames} pictures; one is needed")  # type: ignore[attr-defined]
    if image.mode == "RGB" and "transparency" in image.info and "16" in str(getattr(image, "tile", "")):
        raise ValueError("16-bit colour with one colour declared transparent: save it with an alpha channel")


def _clear_grey(image: Image.Image) -> None:
    """The grey that a PNG of 2 or 4 bits declares transparent, scaled to 8 bits as Pillow scales the pixels."""
    tiles: Any = getattr(image, "tile", None)
    top = {"L;2": 3, "L;4": 15}.get(str(tiles[0][3])) if tiles else None
    if top is not None and isinstance(clear := image.info.get("transparency"), int):
        image.info["transparency"] = (clear & top) * 255 // top  # PNG 1.2, 4.2.9: the other bits are not used


def _orientation(image: Image.Image) -> int:
    try:
        # The base class's method: PNG's own decodes the pixels, to see what stands behind them.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block tells no orientation; the pixels are whole
        return 1


def _orientation_behind(file: BinaryIO) -> int:
    """The orientation of a PNG, whose EXIF block may stand behind the pixels: these are left out, and it is read."""
    file.seek(0)
    chunks = [file.read(8)]
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length = int.from_bytes(head[:4], "big") + 4
        if head[4:] in (b"IDAT", b"fdAT"):
            file.seek(length, io.SEEK_CUR)
        else:
            chunks.append(head + file.read(length))
    empty = b"\0\0\0\0IDAT\x35\xaf\x06\x1e"  # where Pillow stops, its CRC with it
    try:
        with Image.open(io.BytesIO(b"".join([*chunks, empty])), formats=["PNG"]) as image:
            return _orientation(image)
    except Exception:  # damage behind the pixels, which tells no orientation either
        return 1


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The picture in mode L, RGB, CMYK or another without alpha, 8 bits; and its alpha."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = _in_mode(image, "LA" if grey else "RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")), None


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("32-bit pixels have no agreed white: save it with 8 or 16 bits")
    values, top = np.asarray(image).astype(np.int32), 65535
    if image.format == "TIFF":  # of which Pillow gives the numbers as they are stored
        tags = image.tag_v2  # type: ignore[attr-defined]
        top = 2 ** min(tags[ExifTags.Base.BitsPerSample]) - 1
        if tags[ExifTags.Base.PhotometricInterpretation] == WHITE_IS_ZERO:
            values = top - values
    base = Image.fromarray(((values * 255 + top // 2) // top).clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    return base, None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return _in_mode(image, "RGB")
    if image.mode == "L":  # by its 256 values, each exactly: what is fast enough for every pixel is 10 off in the dark
        greys = ImageCms.applyTransform(Image.frombytes("L", (256, 1), bytes(range(256))), transform)
        return Image.fromarray(np.asarray(greys)[0][np.asarray(image)])
    return ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=8)  # few, as one may have megabytes
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From `profile` to sRGB; None where the profile is damaged or for another kind of pixels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
