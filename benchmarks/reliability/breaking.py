"""How a file is broken: as bytes, as JSON, as a safetensors header, as the record of a PNG; all by a given chance."""

import copy
import json
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ODD = (
    None, True, False, -1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**30, 10**39, -(2**63), 0.5, -0.0, 1e-300, 1e300, "",
    "3", "os.system", "../../../etc/passwd", "a\nb", "\x00", "\ud800", "\u202e", "x" * 5000, [], [[]], {}, [1], [1] * 4,
    [None] * 50, [10**6] * 20, [1] * 3000, {"a": {"b": []}}, ["diffusers", "os.system"], {"content": 3}, "torch.half",
)  # fmt: skip
RAW = ("1e999", "NaN", "-Infinity", "1" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 2000 + "1" + "}" * 2000, "01", "'a'")


def broken_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bits, cuts, splices."""
    if not data:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 99)))
    a, b = sorted((chance.randrange(len(data)), chance.randrange(len(data))))
    match chance.randrange(7):
        case 0:
            changed = bytearray(data)
            for _ in range(chance.choice((1, 1, 2, 8, 64))):
                changed[chance.randrange(min(len(data), chance.choice((16, 400, 1 << 40))))] ^= 1 << chance.randrange(8)
            return bytes(changed)
        case 1:
            return data[:a]
        case 2:
            return data[:a] + data[b:]
        case 3:
            return data[:b] + data[a:]
        case 4:
            return data[:a] + chance.randbytes(chance.randrange(1, 64)) + data[a:]
        case 5:
            return data[:a] + bytes(b - a) + data[b:]
        case _:
            return data + data[:a]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def broken_json(tree: Any, chance: random.Random) -> str:
    """The text of an object with one to three things wrong with it."""
    raw: dict[str, str] = {}
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = list(places(tree))
        if len(found) > 500:  # near the root of what is mostly a vocabulary
            found = [place for place in found if len(place[0]) < 100] or found[:500]
        if not found:
            break
        holder, key = chance.choice(found)
        match chance.randrange(8):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[chance.choice(("auto_map", "trust_remote_code", "_class_name", "x" * 600, "a\nb", "\ud800"))] = 1
            case 2 if isinstance(holder[key], int | float):
                holder[key] = holder[key] * chance.choice((-1, 10, 10**6, 10**12, 0.5))
            case 3:
                mark = f"@{len(raw)}@"
                raw[json.dumps(mark)], holder[key] = chance.choice(RAW), mark
            case 4 if isinstance(holder, list):
                holder += [holder[key]] * chance.choice((1, 100))
            case 5:
                other = chance.choice(found)
                holder[key] = copy.deepcopy(other[0][other[1]])
            case _:
                holder[key] = copy.deepcopy(chance.choice(ODD))
    text = json.dumps(tree)
    for mark, value in raw.items():
        text = text.replace(mark, value)
    if chance.random() < 0.08:  # a key that is there twice
        text = text.replace("{", '{"_class_name": "b", "_class_name": "a", ', 1)
    return text


def broken_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, whose length is mostly right."""
    length = struct.unpack("<Q", data[:8])[0]
    text = broken_json(json.loads(data[8 : 8 + length]), chance).encode()
    told = chance.choice((0, 1, len(text) - 1, len(text) + 8, 2**63, 2**64 - 1)) if chance.random() < 0.1 else len(text)
    return struct.pack("<Q", told) + text + data[8 + length :]


def broken_record(data: bytes, chance: random.Random) -> bytes:
    """A PNG with another record, its checksum right."""
    chunks, at = [data[:8]], 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and body.startswith(b"diffusion_unet\0"):
            key, _, text = body.partition(b"\0")
            text = broken_json(json.loads(text), chance).encode()
            kind, body = b"tEXt", key + b"\0" + text
            if chance.random() < 0.2:
                kind, body = b"zTXt", key + b"\0\0" + zlib.compress(text * chance.choice((1, 1000)))
        chunks.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
        at += 12 + size
    return b"".join(chunks)


def break_file(path: Path, chance: random.Random) -> None:
    """Breaks one file, in the terms of its format four times of five."""
    data = path.read_bytes()
    as_bytes = chance.random() < 0.2
    if path.suffix == ".safetensors" and not as_bytes:
        path.write_bytes(broken_header(data, chance))
    elif path.suffix == ".png" and not as_bytes:
        path.write_bytes(broken_record(data, chance))
    elif path.suffix in (".json", ".yaml") and not as_bytes:
        path.write_text(broken_json(json.loads(data), chance))
    elif path.suffix == ".jsonl" and not as_bytes:
        lines = data.decode().splitlines()
        number = chance.randrange(len(lines))
        lines[number] = broken_json(json.loads(lines[number]), chance)
        path.write_text("\n".join(lines))
    else:
        path.write_bytes(broken_bytes(data, chance))
