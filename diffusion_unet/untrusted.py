"""Files from strangers: their JSON, and the headers of their safetensors, checked before anything is made of them.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON) and the bytes of the tensors,
one behind the other without a gap; huggingface.co/docs/safetensors. Its own reader takes the last of keys that are
there twice, and headers of 100 MB.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError, in_bytes

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_VALUES = 1 << 19  # of one JSON file: three bytes of it can take sixty of memory
MAX_RANK = 16
MAX_NAME = 512  # letters of a tensor's name
MAX_NESTING = 64
MAX_DIGITS = 40  # of a whole number; a tokenizer that has no limit says 10^30

# Bytes of one element.
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_FILE_NAME = re.compile(r"\w[\w.-]{,200}", re.ASCII)
_LONG = re.compile(rb"[0-9](?:[eE]\+?[0-9]{3}|[0-9]{%d})" % MAX_DIGITS)  # what may be a number that is refused
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a letter beyond 16 bits; alone it is no text


class Entry(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


class Header(NamedTuple):
    """The header of a safetensors file."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


class Field(NamedTuple):
    """What a setting in a file may be: a value of `kind`, a number from `least` to `most`; a bool is never a number."""

    kind: type | tuple[type, ...]
    least: float = 0
    most: float = math.inf
    listed: bool = False  # a list of these


def shorten(text: str, limit: int = 60) -> str:
    """At most `limit` characters of a text from outside, in ASCII and quotes, fit for a message of one line."""
    return ascii(text) if len(text) <= limit else ascii(text[:limit]) + "..."


def is_file_name(value: Any) -> bool:
    """Whether it is the name of a file, without a folder, in letters that can be shown."""
    return isinstance(value, str) and _FILE_NAME.fullmatch(value) is not None


def read_bytes(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes. Raises InputError for one that is missing, larger, or no file."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited on for ever
            raise InputError(f"{path}: is no file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is this the right folder?") from None
    if len(data) > limit:
        raise InputError(f"{path}: over {in_bytes(limit)}, too large for what it is")
    return data


def read_json(path: str | Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes (1 MB).

    Raises:
        InputError: the file is missing, too large, no JSON, or its top level is no object.
    """
    return parse_object(read_bytes(Path(path), limit), str(path))


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes, of which errors speak as `name`.

    Python's reader takes more than JSON: refused are NaN, numbers beyond float64, whole numbers of over MAX_DIGITS
    digits, keys that are there twice, lists deeper than MAX_NESTING, and halves of letters. Raises InputError.
    """
    try:
        value = _parse(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: is no JSON ({_line(error)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{name}: holds a {type(value).__name__}, where an object was expected")
    return value


def _parse(data: bytes) -> Any:
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"over {MAX_VALUES} values")
    text = data.decode("utf-8-sig")
    numbers: dict[str, Any] = {"parse_float": _finite, "parse_int": _whole} if _LONG.search(data) else {}
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_finite, **numbers)
    level = [value]
    for _ in range(MAX_NESTING):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            break
    else:
        raise ValueError(f"over {MAX_NESTING} levels deep")
    if _HALF.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # a half alone cannot be encoded
    return value


def _children(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (child for child in inner if isinstance(child, dict | list))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shorten(twice)} is there twice")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(text, 20)} is not finite")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def checked(values: Mapping[str, Any], fields: Mapping[str, Field], source: str | Path) -> dict[str, Any]:
    """The values that are known, each checked, whole numbers made floats where those are meant; null is as if missing.

    Raises InputError, which `source` begins, with the field's name.
    """
    known = {name: values[name] for name in fields if values.get(name) is not None}
    for name, value in known.items():
        field = fields[name]
        items = value if field.listed and isinstance(value, list | tuple) else [value]
        if (field.listed and items is not value) or not all(_is(item, field) for item in items):
            raise InputError(f"{source}: {name} is {ascii(value)[:60]}, and must be {_wanted(field)}")
        if field.kind is float:
            known[name] = [float(item) for item in items] if field.listed else float(value)
    return known


def _is(value: Any, field: Field) -> bool:
    kinds = field.kind if isinstance(field.kind, tuple) else (field.kind,)
    if float in kinds:
        kinds = (*kinds, int)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) in kinds and (not number or field.least <= value <= field.most)


def _wanted(field: Field) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object"}
    kinds = field.kind if isinstance(field.kind, tuple) else (field.kind,)
    text = " or ".join(names[kind] for kind in kinds)
    if int in kinds or float in kinds:
        text += f" from {field.least:g}" + ("" if field.most == math.inf else f" to {field.most:g}")
    return f"a list, of {text}" if field.listed else text


# --- safetensors -----------------------------------------------------------------------------------------------------


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, every rule of the format checked: the bytes are where it says.

    Raises InputError, which names the file and what is wrong.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"it is cut short: {in_bytes(size)}")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header is over {in_bytes(MAX_HEADER_BYTES)}")
            data = file.read(length)
        return _header(data, size - 8 - length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is this the right folder?") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: damaged, or no safetensors file ({_line(error)}); copy or download it again"
        ) from None


def _header(data: bytes, size: int) -> Header:
    """`data`, of a file that holds `size` bytes behind it. Raises ValueError."""
    if not data.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    tree: dict[str, Any] = _parse(data)
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is more than texts")
    spans = sorted((*_span(name, entry), name) for name, entry in tree.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise ValueError(f"{shorten(name)} {'overlaps another' if start < end else 'has a gap before it'}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors take {in_bytes(end)}, and it holds {in_bytes(size)} for them")
    return Header({name: Entry(entry["dtype"], tuple(entry["shape"])) for name, entry in tree.items()}, metadata)


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends. Raises ValueError unless its entry is whole and agrees with itself."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"{shorten(name)} is no name for a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shorten(name)} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{shorten(name)} is of the type {shorten(str(dtype))}, which is not known here")
    if not _sizes(shape) or len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) * DTYPES[dtype] >= 1 << 63:
        raise ValueError(f"{shorten(name)} is of the shape {shorten(str(shape))}, which cannot be")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shorten(name)} has the data_offsets {shorten(str(offsets))}")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype]:
        raise ValueError(f"{shorten(name)} is {dtype} {shape}, and its data_offsets are {offsets}")
    return start, stop


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
