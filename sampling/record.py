"""The record of a picture: all that drawing it again needs, as JSON in the picture's own file.

It is an object with the fields of `FIELDS`, those left out that say nothing. A record that is read is a stranger's.
"""

import hashlib
import itertools
import json
import math
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_unet import __version__
from diffusion_unet.errors import InputError, in_bytes
from diffusion_unet.images import RECORD, open_png, parameters
from diffusion_unet.untrusted import MAX_JSON_BYTES, Field, checked, parse_object, shorten

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffusion_unet.model import DiffusionModel

FORMAT = 1  # raised by whoever changes what a field means
MAX_FILES = 1000  # of a folder that is hashed
A1111 = "parameters"  # key of the PNG text in A1111's words

FIELDS = {
    "format": Field(int, 1, 1_000_000),
    "model": Field(str),  # path, as it was given
    "model_hash": Field(str),  # DiffusionModel.fingerprint(), without adapters
    "prompt": Field(str),  # none for a model without text
    "negative_prompt": Field(str),
    "seed": Field(int, 0, 2**64 - 1),
    "variation_seed": Field(int, 0, 2**64 - 1),
    "variation_strength": Field(float, 0, 1),
    "rng": Field(str),
    "steps": Field(int, 1, 10_000),
    "solver": Field(str),
    "eta": Field(float, 0, 1),
    "spacing": Field(str),
    "sigmas": Field(float, 0, 1e12, listed=True),  # [steps + 1], the last 0; float64, which JSON keeps to the bit
    "guidance_scale": Field(float, -math.inf),
    "guidance_rescale": Field(float, 0, 1),
    "interval": Field(float, 0, listed=True),  # guided from above the first sigma up to the second, which may lack
    "size": Field(int, 1, 1 << 20, listed=True),  # height and width in pixels, where they were asked for
    "tile": Field(int, 1, 1 << 20),  # pixels
    "exact": Field(bool),  # one picture a pass
    "batch_size": Field(int, 1, 1 << 20),  # pictures that went through the network together with it
    "image": Field(dict),  # FILE
    "mask": Field(dict),  # FILE
    "strength": Field(float, 0, 1),
    "adapters": Field(dict, listed=True),  # ADAPTER each
    "dtype": Field(str),  # of the network's weights: float32, bfloat16, float16
    "device": Field(str),
    "threads": Field(int, 1, 1024),
    "versions": Field(dict),  # by name, as texts
}
FILE = {"path": Field(str), "sha256": Field(str)}  # path as it was given; none for what was no file
ADAPTER = {  # image, encoder: FILE
    "kind": Field(str), **FILE, "scale": Field(float, -math.inf), "image": Field(dict), "encoder": Field(dict),
}  # fmt: skip
_NEEDED = ("model_hash", "seed", "steps", "solver", "guidance_scale")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEVICE = re.compile(r"[a-z]{2,12}(:[0-9]{1,3})?")


def environment(model: "DiffusionModel") -> dict[str, Any]:
    """What the bits of a picture depend on beside model and request: the fields dtype, device, threads, versions."""
    weight = next(model.unet.parameters())
    versions = {"diffusion_unet": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "numpy", "diffusers", "transformers")}
    versions["cpu"] = torch.backends.cpu.get_cpu_capability()
    if weight.device.type == "cuda":
        versions["gpu"] = torch.cuda.get_device_name(weight.device)
    dtype = str(weight.dtype).removeprefix("torch.")
    return {"dtype": dtype, "device": str(weight.device), "threads": torch.get_num_threads(), "versions": versions}


def record_of(model: "DiffusionModel", model_hash: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a picture that `model` draws here.

    request: the fields that `environment` does not give, as `sample` takes them; those that are None or an empty list
    are left out. Raises InputError for a value that no record can hold.
    """
    low, high = request.get("interval") or (None, None)
    sides = [low or 0.0] if high is None else [low or 0.0, high]
    interval = None if low is high is None else sides
    given = {"format": FORMAT, "model_hash": model_hash, **request, "interval": interval, **environment(model)}
    unknown = given.keys() - FIELDS.keys()
    assert not unknown, unknown
    present = {name: given[name] for name in FIELDS if name in given and given[name] not in (None, [], ())}
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in present.items()}  # as in JSON
    return checked(lists, FIELDS, "the record of a picture")


def attach(image: "Image", record: Mapping[str, Any]) -> None:
    """Puts the record into `image.info`, which `save_png` writes into the file."""
    image.info[RECORD] = json.dumps(record, allow_nan=False)
    image.info[A1111] = parameters({"prompt": "", **record}, image.size)


def file_entry(source: "Path | str | bytes | Image") -> dict[str, str]:
    """The record of a file, by its path or its bytes, of a folder, or of a picture's pixels. Raises InputError."""
    if isinstance(source, Path | str):
        return {"path": str(source), "sha256": sha256(Path(source))}
    pixels = source if isinstance(source, bytes) else f"{source.mode} {source.size}".encode() + source.tobytes()
    return {"sha256": hashlib.sha256(pixels).hexdigest()}


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes; of a folder, of the names and digests of its files. Raises InputError."""
    try:
        if path.is_dir():
            files = list(itertools.islice((file for file in path.rglob("*") if file.is_file()), MAX_FILES + 1))
            if len(files) > MAX_FILES:
                raise InputError(f"{path}: has over {MAX_FILES} files, too many for an adapter")
            digest = hashlib.sha256()
            for file in sorted(files):
                digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
            return digest.hexdigest()
        if not path.is_file():  # nor a pipe, which would be waited on for ever
            raise InputError(f"{path}: is no file")
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


# --- reading


def read_picture(path: Path) -> "tuple[Image, dict[str, Any]]":
    """A PNG as it is stored, and its record, each field checked; those not known here are left out.

    Raises InputError: no PNG, no record, another program's, one of a newer format, or one that no picture has.
    """
    image, texts = open_png(path)
    if RECORD not in texts:
        if A1111 in texts:
            raise InputError(f"{path}: holds the record of another program, and none of diffusion-unet")
        raise InputError(f"{path}: holds no record: it was not drawn by diffusion-unet, or written anew since")
    return image, parse_record(texts[RECORD], f"{path}: its record")


def parse_record(text: str, name: str) -> dict[str, Any]:
    """The fields of a record in JSON, of which errors speak as `name`. Raises InputError."""
    if len(text) > MAX_JSON_BYTES:
        raise InputError(f"{name} is over {in_bytes(MAX_JSON_BYTES)}, too large for what it is")
    values = parse_object(text.encode(), name)
    if isinstance(values.get("format"), int) and values["format"] > FORMAT:
        raise InputError(
            f"{name} is of format {shorten(str(values['format']))}, and {FORMAT} is known here: update diffusion-unet"
        )
    record = checked(values, FIELDS, name)
    for field in _NEEDED:
        if field not in record:
            raise InputError(f"{name} has no {field}: it is none of diffusion-unet, or was changed since")
    for field, right in {
        "model_hash": _SHA256.fullmatch(record["model_hash"]),
        "dtype": record.get("dtype", "float32") in ("float32", "bfloat16", "float16"),
        "device": _DEVICE.fullmatch(record.get("device", "cpu")),
        "model": "\0" not in record.get("model", ""),
        "size": len(record.get("size", (1, 1))) == 2,
        "interval": len(record.get("interval", (0,))) in (1, 2),
        "sigmas": len(record.get("sigmas", (1, 0))) in range(2, 10_002),
        "adapters": len(record.get("adapters", ())) <= 64,
        "versions": all(type(value) is str for value in record.get("versions", {}).values()),
    }.items():
        if not right:
            raise InputError(f"{name}: {field} is {shorten(str(record[field]))}, which cannot be")
    for field in ("image", "mask"):
        if field in record:
            record[field] = _file(record[field], f"{name}: {field}")
    if "adapters" in record:
        record["adapters"] = [_adapter(adapter, f"{name}: an adapter") for adapter in record["adapters"]]
    return record


def _file(values: dict[str, Any], name: str, fields: Mapping[str, Field] = FILE) -> dict[str, Any]:
    entry = checked(values, fields, name)
    if not _SHA256.fullmatch(entry.get("sha256", "")) or "\0" in entry.get("path", ""):
        raise InputError(f"{name} is {shorten(str(values))}, which cannot be")
    return entry


def _adapter(values: dict[str, Any], name: str) -> dict[str, Any]:
    entry = _file(values, name, ADAPTER)
    if "kind" not in entry:
        raise InputError(f"{name} is {shorten(str(values))}, which has no kind")
    return entry | {part: _file(entry[part], name) for part in ("image", "encoder") if part in entry}
