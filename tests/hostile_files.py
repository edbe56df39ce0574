"""About 120 images and captions as they come from strangers, and what must become of each.

An image is refused, for a reason that is given as a regular expression, or it has the pixels that its specification
says, over white, which are known here from how it was made and not from a decoder. `beside` lays them out with caption
files, `listed` under a metadata.jsonl; both say what is to be expected under the name of each sample.
"""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tiny_images import (
    LINEAR,
    SRGB,
    chunk,
    encoded,
    linear_profile,
    png,
    png8,
    png16,
    profile,
    srgb,
    tiff,
)

RNG = np.random.default_rng(9)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # H W C
GREY, ALPHA = (RNG.integers(0, 256, (6, 9), dtype=np.uint8) for _ in range(2))
FLAT = RNG.integers(0, 256, (2, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # 8 x 8 alike: JPEG keeps them
PLAIN = png8(RGB, 2)
PLACES = 10  # of truncation
DEEP = [16, 16, 16]
REC2020 = {"r": (0.67344, 0.27897, -0.00193), "g": (0.16567, 0.67534, 0.02998), "b": (0.12508, 0.04569, 0.79686)}  # D50

Make = Callable[[Path], None]


class Hostile(NamedTuple):
    """An image file: `content`, or what puts it there."""

    name: str
    content: bytes | Make
    refused: str | None = None  # a regular expression for the reason
    pixels: NDArray[Any] | None = None  # [H, W, 3]
    within: float = 0.0  # of these


class Caption(NamedTuple):
    """A good picture's caption: a file, or a row of the metadata but for the name of the picture."""

    name: str
    content: bytes | dict[str, Any]
    refused: str | None = None
    captions: list[str] | None = None


class Expected(NamedTuple):
    item: str
    refused: str | None = None
    pixels: NDArray[Any] | None = None
    within: float = 0.0
    captions: list[str] | None = None


# ---- images --------------------------------------------------------------------------------------------------------


def images() -> Iterator[Hostile]:
    yield from truncated()
    yield from depths()
    yield from inks()
    yield from transparent()
    yield from profiled()
    yield from turned()
    yield from bombs()
    yield from disguised()
    yield from places()


def used(name: str, content: bytes | Make, pixels: NDArray[Any], within: float = 0.0) -> Hostile:
    if pixels.ndim == 2:
        pixels = np.dstack([pixels] * 3)
    return Hostile(name, content, None, pixels, within)


def over_white(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    weight = (alpha / 255)[..., None]
    return pixels.reshape(*alpha.shape, -1) * weight * np.ones(3) + 255 * (1 - weight)


def truncated() -> Iterator[Hostile]:
    picture = Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = encoded(picture, form)
        for part in range(PLACES):
            cut = whole[: len(whole) * part // PLACES]
            yield Hostile(f"cut {part} of 10.{form.lower()}", cut, "cannot be used")


def depths() -> Iterator[Hostile]:
    deep, colour = RNG.integers(0, 65536, (6, 9)), RNG.integers(0, 65536, (6, 9, 3))
    exact = np.floor(deep / 257 + 0.5)
    little, big = deep.astype("<u2").tobytes(), deep.astype(">u2").tobytes()
    yield used("16-bit grey.png", png16(deep, 0), exact)
    yield used("16-bit colour.png", png16(colour, 2), colour / 257, 1)
    yield used("16-bit grey.tiff", tiff((9, 6), [16], 1, little), exact)
    yield used("16-bit grey big-endian.tiff", tiff((9, 6), [16], 1, big, order=">"), exact)
    yield used("16-bit grey white is zero.tiff", tiff((9, 6), [16], 0, little), np.floor((65535 - deep) / 257 + 0.5))
    yield used("16-bit colour.tiff", tiff((9, 6), DEEP, 2, colour.astype("<u2").tobytes()), colour / 257, 1)
    twelve = bytes([0xFF, 0xF8, 0x00, 0x00, 0x10, 0x80])  # 4095, 2048, 1, 128
    yield used("12-bit grey.tiff", tiff((4, 1), [12], 1, twelve), np.array([[255, 128, 0, 8]]))
    yield Hostile("32-bit.tiff", tiff((1, 1), [32], 1, b"\0\0\0\1", (339, "H", [2])), "no agreed white")
    one_bit = np.array([[1, 0, 1, 1, 0, 0, 0, 1]])
    yield used("1-bit.png", png((8, 1, 1, 0), b"\0" + np.packbits(one_bit).tobytes()), one_bit * 255)


def inks() -> Iterator[Hostile]:
    amounts = RNG.integers(0, 256, (2, 4, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    whole = encoded(Image.fromarray(amounts, "CMYK"), "JPEG", quality=100, subsampling=0)
    place = whole.index(b"\xff\xee")  # the segment that says Adobe, so that 255 stands for no ink
    assert whole[place + 4 : place + 9] == b"Adobe"
    end = place + 2 + struct.unpack(">H", whole[place + 2 : place + 4])[0]

    def seen(amounts: NDArray[Any]) -> NDArray[Any]:
        return (255.0 - amounts[..., :3]) * (255.0 - amounts[..., 3:]) / 255

    yield used("CMYK Adobe.jpg", whole, seen(amounts), 3)
    yield used("CMYK.jpg", whole[:place] + whole[end:], seen(amounts), 3)  # no standard says so; what reads it does
    # Told to be YCCK: the three are then Y, Cb, Cr of red, green, blue (JFIF 1.02), of which the inks are the rest.
    y, cb, cr = (255.0 - np.moveaxis(amounts[..., :3].astype(float), -1, 0)) - np.array([0, 128, 128])[:, None, None]
    light = np.dstack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]).clip(0, 255)
    turned = np.dstack([light, amounts[..., 3:]])
    yield used("YCCK.jpg", whole[: end - 1] + b"\2" + whole[end:], seen(turned), 4)
    offset = amounts.tobytes()
    yield used("CMYK.tiff", tiff((32, 16), [8] * 4, 5, offset), seen(amounts), 1)


def transparent() -> Iterator[Hostile]:
    colours = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    index, palette = RNG.integers(0, 4, (6, 9), dtype=np.uint8), chunk(b"PLTE", colours.tobytes())
    clear = np.array([255, 0, 51, 128])
    yield used("LA.png", png8(np.dstack([GREY, ALPHA]), 4), over_white(GREY, ALPHA), 0.51)
    yield used("RGBA.png", png8(np.dstack([RGB, ALPHA]), 6), over_white(RGB, ALPHA), 0.51)
    yield used("P.png", png8(index, 3, palette), colours[index])
    shades = chunk(b"tRNS", bytes(clear.tolist()))
    yield used(
        "P of four opacities.png", png8(index, 3, palette, shades), over_white(colours[index], clear[index]), 0.51
    )
    gone = np.where(index == 1, 0, 255)
    yield used("P one clear.png", png8(index, 3, palette, chunk(b"tRNS", b"\xff\0")), over_white(colours[index], gone))
    two = np.dstack([index, ALPHA])
    tables = (320, "H", [int(value) * 257 for band in colours.T for value in [*band, *[0] * 252]])
    of_palette = tiff((9, 6), [8, 8], 3, two.tobytes(), (338, "H", [2]), tables)
    yield used("PA.tiff", of_palette, over_white(colours[index], ALPHA), 0.51)
    key = chunk(b"tRNS", struct.pack(">HHH", *RGB[2, 3].tolist()))
    one = np.where((RGB[2, 3] == RGB).all(-1), 0, 255)
    yield used("RGB one clear.png", png8(RGB, 2, key), over_white(RGB, one))
    yield Hostile("16-bit RGB one clear.png", png16(RGB, 2, key), "alpha channel")
    for bits, packed, values in ((2, 0b00011011, [0, 1, 2, 3]), (4, 0x5A, [5, 10])):
        grey = np.array([values]) * 255 // (2**bits - 1)
        data = png((len(values), 1, bits, 0), bytes([0, packed]), chunk(b"tRNS", struct.pack(">H", values[1])))
        yield used(f"{bits}-bit grey one clear.png", data, np.where(np.array([values]) == values[1], 255, grey))


def profiled() -> Iterator[Hostile]:
    linear, plain = RGB / 255, Image.fromarray(RGB)
    mild = RNG.integers(80, 180, (6, 9, 3), dtype=np.uint8)  # within sRGB, so that nothing is clipped
    wide, own = (np.array([primaries[c] for c in "rgb"]).T for primaries in (REC2020, SRGB))
    expected = srgb(mild / 255 @ (np.linalg.inv(own) @ wide).T)
    yield used("ICC wide.png", encoded(Image.fromarray(mild), icc_profile=linear_profile("rgb", REC2020)), expected, 2)
    yield used("ICC damaged.png", encoded(plain, icc_profile=linear_profile()[:140]), RGB)
    yield used("ICC of other pixels.png", encoded(Image.fromarray(GREY), icc_profile=linear_profile()), GREY)
    grey = profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": LINEAR})
    yield used("ICC grey.png", encoded(Image.fromarray(GREY), icc_profile=grey), srgb(GREY / 255), 1.5)
    large = linear_profile(padding=10_000_000)
    yield used("ICC of 10 MB.tiff", encoded(plain, "TIFF", icc_profile=large), srgb(linear), 1.5)
    yield Hostile("ICC of 10 MB.png", encoded(plain, icc_profile=large), "cannot be used")


def turned() -> Iterator[Hostile]:
    """EXIF 2.32, tag 0x0112: what the eight numbers do to the stored rows and columns, undone."""
    stored = {
        1: FLAT, 2: FLAT[:, ::-1], 3: FLAT[::-1, ::-1], 4: FLAT[::-1],
        5: FLAT.swapaxes(0, 1), 6: FLAT.swapaxes(0, 1)[::-1],
        7: FLAT.swapaxes(0, 1)[::-1, ::-1], 8: FLAT.swapaxes(0, 1)[:, ::-1],
    }  # fmt: skip
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        data = encoded(picture, "JPEG", exif=exif, quality=100, subsampling=0)
        yield used(f"EXIF {orientation}.jpg", data, FLAT, 3)


def bombs() -> Iterator[Hostile]:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        yield Hostile(f"animated.{form.lower()}", data, "holds 2 pictures")
    yield used("1x1.png", png8(RGB[:1, :1], 2), RGB[:1, :1])
    ramp = (np.arange(30_000) % 251).astype(np.uint8)
    yield used("1x30000.png", png8(ramp[:, None], 0), ramp[:, None])
    yield used("30000x1.png", png8(ramp[None], 0), ramp[None])
    side = (1 << 16, 1 << 15)  # 2^31 pixels
    yield Hostile("bomb.png", png((*side, 8, 2), b""), "pixels")
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(6) + b","
    yield Hostile("bomb.gif", gif + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2L\1\0;", "pixels")
    bmp = struct.pack("<IiiHHIIiiII", 40, *side, 1, 24, 0, 0, 0, 0, 0, 0)
    yield Hostile("bomb.bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + bmp, "pixels")
    yield Hostile("bomb.tiff", tiff(side, [8], 1, b"\0"), "pixels")
    unpacked = zlib.compress(bytes(100 << 20))
    yield Hostile("zTXt bomb.png", png8(RGB, 2, chunk(b"zTXt", b"Comment\0\0" + unpacked)), "cannot be used")
    yield Hostile("iCCP bomb.png", png8(RGB, 2, chunk(b"iCCP", b"profile\0\0" + unpacked)), "cannot be used")
    # So many pixels are allowed, but not in 512 MB.
    yield Hostile("memory.png", png((11_580, 11_580, 8, 2), b""), "needs more than 512 MB to decode")
    yield Hostile("scans.jpg", scans(), "takes longer than 2 s to decode")
    once = tiff((9, 6), [8], 1, GREY.tobytes(), following=8)  # the first directory follows on itself
    yield used("IFD loop.tiff", once, GREY)
    yield Hostile("IFD chain.tiff", chain(2000), "holds 2001 pictures")


def scans() -> bytes:
    """A progressive JPEG of few bytes whose last scan comes a thousand times, each over all of its pixels."""
    whole = encoded(Image.new("L", (6000, 6000), 99), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * 1000 + whole[-2:]


def chain(count: int) -> bytes:
    """A TIFF with so many directories behind its own, all of the same pixels."""
    first = tiff((9, 6), [8], 1, GREY.tobytes())
    entries = first[8:118]  # their number, and nine of them
    behind = [len(first) + number * (len(entries) + 4) for number in range(count)]
    whole = tiff((9, 6), [8], 1, GREY.tobytes(), following=behind[0])
    return whole + b"".join(entries + struct.pack("<I", place) for place in [*behind[1:], 0])


def disguised() -> Iterator[Hostile]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("META-INF/MANIFEST.MF", "Main-Class: Evil")
    index = (GREY > 127).astype(np.uint8)
    picture = Image.fromarray(index, "P")
    picture.putpalette([*RGB[0, 0].tolist(), *RGB[0, 1].tolist()])
    yield used("ZIP behind.png", PLAIN + archive.getvalue(), RGB)
    yield used("HTML behind.png", PLAIN + b"<html><script>alert(1)</script></html>", RGB)
    yield used("GIFAR.gif", encoded(picture, "GIF") + archive.getvalue(), RGB[0][index])
    jpeg = encoded(Image.fromarray(FLAT), "JPEG", quality=100, subsampling=0)
    yield used("JPEG by another name.png", jpeg, FLAT, 3)
    yield used("PNG by another name.webp", PLAIN, RGB)
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'
    header = b"".join(card.ljust(80) for card in (b"SIMPLE  =  T", b"BITPIX  =  8", b"NAXIS   =  0", b"END"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n"
    others = {
        "SVG": svg, "FITS": header.ljust(2880), "EPS": eps, "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\n%%EOF",
        "ICO": encoded(Image.fromarray(RGB), "ICO"), "text": b"no picture", "zeros": bytes(100),
    }  # fmt: skip
    for kind, data in others.items():
        yield Hostile(f"{kind}.png", data, "no AVIF, BMP")
    yield Hostile("nothing.png", b"", "no AVIF, BMP")


def places() -> Iterator[Hostile]:
    """What a name leads to, and names."""

    def outside(path: Path) -> None:
        out = path.parent.parent / "outside.png"
        out.write_bytes(PLAIN)
        path.symlink_to(out)

    yield Hostile("pipe.png", os.mkfifo, "no file")
    yield Hostile("link out.png", outside, "lies outside the folder")
    yield Hostile("link in a circle.png", lambda path: path.symlink_to(path.name), "circle")
    yield Hostile("folder.png", lambda path: path.mkdir(), "no file")
    yield Hostile("link to a device.png", lambda path: path.symlink_to("/dev/zero"), "lies outside the folder")
    yield used("two\nlines \x1b[31m.png", PLAIN, RGB)
    yield used("n" * 251 + ".png", PLAIN, RGB)
    yield used(os.fsdecode(b"no UTF-8 \xff\xfe.png"), PLAIN, RGB)


# ---- captions ------------------------------------------------------------------------------------------------------

LONG = "word " * 100_000  # as many tokens


def caption_files() -> list[Caption]:
    """Files beside a picture."""
    return [
        Caption("caption empty", b"", "caption is empty"),
        Caption("caption blank", b" \r\n\t\n", "caption is empty"),
        Caption("caption NUL", b"a red\0square", None, ["a red\0square"]),
        Caption("caption of 1 MB", b"x" * 1_000_000, "1000000 characters"),
        Caption("caption of 100,000 tokens", LONG.encode(), "499999 characters"),
        Caption("caption of 17 MB", b"x" * 17_000_000, "17000000 bytes"),
        Caption("caption UTF-8 BOM", b"\xef\xbb\xbfa square", None, ["a square"]),
        Caption("caption UTF-16 BOM", "a square".encode("utf-16"), "no UTF-8"),
        Caption("caption no UTF-8", b"a square \xff", "no UTF-8"),
        Caption("caption surrogate", b"a \xed\xa0\x80 square", "no UTF-8"),
    ]


def caption_rows() -> list[Caption]:
    """Rows of metadata.jsonl; those without a file_name get that of a picture."""
    return [
        Caption("row empty", {"text": ""}, "caption is empty"),
        Caption("row blank", {"text": [" ", "\n"]}, "caption is empty"),
        Caption("row NUL", {"text": "a red\0square"}, None, ["a red\0square"]),
        Caption("row of 1 MB", {"text": "x" * 1_000_000}, "1000000 characters"),
        Caption("row of 100,000 tokens", {"text": LONG}, "499999 characters"),
        Caption("row surrogate", {"text": "a \ud800 square"}, "lone surrogate"),
        Caption("row without text", {}, "no caption under 'text'"),
        Caption("row of a number", {"text": 7}, "no caption under 'text'"),
        Caption("row ../", {"text": "a", "file_name": "../outside.png"}, "lies outside the folder"),
        Caption("row ../ deep", {"text": "a", "file_name": "a/../../outside.png"}, "lies outside the folder"),
        Caption("row absolute", {"text": "a", "file_name": "/etc/passwd"}, "lies outside the folder"),
        Caption("row NUL in the name", {"text": "a", "file_name": "a\0.png"}, "no file name under 'file_name'"),
        Caption("row surrogate in the name", {"text": "a", "file_name": "\ud800.png"}, "no file can have this name"),
        Caption("row of no file", {"text": "a", "file_name": "none.png"}, "is no file"),
    ]


# ---- folders -------------------------------------------------------------------------------------------------------


def write(folder: Path, items: list[Hostile]) -> None:
    folder.mkdir(parents=True)
    for item in items:
        path = folder / item.name
        if isinstance(item.content, bytes):
            path.write_bytes(item.content)
        else:
            item.content(path)


def beside(folder: Path, items: list[Hostile]) -> dict[str, Expected]:
    """Every image with a caption file, and a good picture with every caption file."""
    write(folder, items)
    expected = {}
    for item in items:
        path = folder / item.name
        if len(os.fsencode(item.name)) <= 255 - len(".txt") + len(path.suffix):
            path.with_suffix(".txt").write_text("a square")
        name = str(path) if str(path).isprintable() else repr(str(path))
        expected[name] = Expected(item.name, item.refused, item.pixels, item.within, ["a square"])
    for caption in caption_files():
        path = folder / f"{caption.name}.png"
        path.write_bytes(PLAIN)
        assert isinstance(caption.content, bytes)
        path.with_suffix(".txt").write_bytes(caption.content)
        expected[str(path)] = Expected(caption.name, caption.refused, RGB, 0.0, caption.captions)
    return expected


def listed(folder: Path, items: list[Hostile]) -> dict[str, Expected]:
    """Every image in a row, and every row; in lines that are no JSON the same."""
    write(folder, items)
    (folder / "good.png").write_bytes(PLAIN)
    (folder.parent / "outside.png").write_bytes(PLAIN)
    expected, lines = {}, []

    def add(item: Expected, row: dict[str, Any] | bytes) -> None:
        lines.append(row if isinstance(row, bytes) else json.dumps(row).encode())
        place = f"{folder / 'metadata.jsonl'}, row {len(lines)}"
        file = row.get("file_name") if isinstance(row, dict) else None
        expected[f"{place}, {file!r}" if file and "\0" not in file else place] = item

    for item in items:
        found = Expected(item.name, item.refused, item.pixels, item.within, ["a square"])
        add(found, {"file_name": item.name, "text": "a square"})
    for caption in caption_rows():
        assert isinstance(caption.content, dict)
        row = {"file_name": "good.png", **caption.content}
        add(Expected(caption.name, caption.refused, RGB, 0.0, caption.captions), row)
    for name, line in (("no UTF-8", b'{"file_name": "good.png", "text": "\xff"}'), ("nested", b"[" * 100_000)):
        add(Expected(f"row {name}", "no JSON"), line)
    utf16 = '{"file_name": "good.png", "text": "a"}'.encode("utf-16-be")
    add(Expected("row UTF-16", "no JSON"), utf16)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    return expected
