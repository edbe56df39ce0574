"""Image files made by hand, from the specifications of their formats."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# ---- PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header: tuple[int, int, int, int], rows: bytes, *extra: bytes) -> bytes:
    """(width, height, bits, colour type), filtered rows, chunks between header and data."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBB", *header) + b"\0\0\0")
    return start + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png8(values: np.ndarray, colour: int, *extra: bytes) -> bytes:
    """values: [H, W] or [H, W, C] of 8 bits."""
    return png((values.shape[1], values.shape[0], 8, colour), b"".join(b"\0" + row.tobytes() for row in values), *extra)


def png16(values: np.ndarray, colour: int, *extra: bytes) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png((values.shape[1], values.shape[0], 16, colour), rows, *extra)


# ---- TIFF 6.0

_SIZES = {"B": 1, "H": 2, "I": 4}
_TYPES = {"B": 1, "H": 3, "I": 4}


def tiff(
    size: tuple[int, int],
    bits: Sequence[int],
    photometric: int,
    data: bytes,
    *extra: tuple[int, str, Sequence[int]],
    order: str = "<",
    following: int = 0,
) -> bytes:
    """One strip of (W, H), uncompressed. extra: (tag, letter of struct, values); following: offset of the next IFD."""
    short, long = "H", "I"
    tags = [
        (256, long, [size[0]]), (257, long, [size[1]]), (258, short, bits), (259, short, [1]),
        (262, short, [photometric]), (273, long, [0]), (277, short, [len(bits)]), (278, long, [size[1]]),
        (279, long, [len(data)]), *extra,
    ]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    outside = [_SIZES[kind] * len(values) for _, kind, values in tags if _SIZES[kind] * len(values) > 4]
    place = start + sum(size + size % 2 for size in outside)
    entries, tail = b"", b""
    for tag, kind, values in sorted(tags):
        raw = struct.pack(f"{order}{len(values)}{kind}", *([place] if tag == 273 else values))
        entries += struct.pack(f"{order}HHI", tag, _TYPES[kind], len(values))
        if len(raw) > 4:
            entries += struct.pack(f"{order}I", start + len(tail))
            tail += raw + b"\0" * (len(raw) % 2)
        else:
            entries += raw.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + struct.pack(f"{order}I", following) + tail + data


# ---- ICC.1 profiles, version 2

SRGB = {"r": (0.43607, 0.22249, 0.01392), "g": (0.38515, 0.71687, 0.09708), "b": (0.14307, 0.06061, 0.71410)}
WHITE = (0.9642, 1.0, 0.8249)
LINEAR = b"curv\0\0\0\0" + struct.pack(">I", 0)  # no entries


def _xyz(value: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in value)


def profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """With these tags besides those that all have. kind: "mntr" or "prtr"; connection: "XYZ " or "Lab "."""
    tags = {b"wtpt": _xyz(WHITE), b"cprt": b"text\0\0\0\0none\0", **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, kind, space, connection)
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">iii", *(round(v * 65536) for v in WHITE))
    return header.ljust(128, b"\0") + table + body


def linear_profile(
    columns: str = "rgb", primaries: dict[str, tuple[float, float, float]] = SRGB, padding: int = 0
) -> bytes:
    """Linear light, primaries (XYZ) in the order of `columns`, and so many bytes that say nothing."""
    tags = {b"copy": b"text\0\0\0\0" + b" " * padding + b"\0"} if padding else {}
    for own, taken in zip("rgb", columns, strict=True):
        tags[own.encode() + b"XYZ"] = _xyz(primaries[taken])
        tags[own.encode() + b"TRC"] = LINEAR
    return profile(b"mntr", b"RGB ", b"XYZ ", tags)


def ink_profile(weights: Sequence[int]) -> bytes:
    """A printer whose four inks take so many 255ths of the lightness (CIE L*) of white paper, and give no colour."""
    identity = struct.pack(">HH", 0, 65535)
    corners = [[bool(number >> (3 - ink) & 1) for ink in range(4)] for number in range(16)]  # the last ink first
    taken = [sum(weight for weight, full in zip(weights, corner, strict=True) if full) for corner in corners]
    table = b"".join(struct.pack(">HHH", round((255 - one) / 255 * 0xFF00), 0x8000, 0x8000) for one in taken)
    unit = struct.pack(">9i", *(65536 * (row == column) for row in range(3) for column in range(3)))
    lut = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + struct.pack(">HH", 2, 2) + identity * 4 + table + identity * 3
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light 0 to 1 -> 0 to 255 (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
