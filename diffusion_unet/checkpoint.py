"""Files of weights and settings: safetensors and JSON only, read strictly, written whole or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError, SaveError, in_bytes
from .untrusted import is_file_name, read_header, read_json


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Its header is checked before a byte is mapped.

    Raises:
        InputError: the file is missing, truncated or no safetensors.
    """
    read_header(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged, or no safetensors file ({error}); copy or download it again") from None


def read_weights(folder: Path, stem: str, variant: str | None = None) -> tuple[dict[str, Tensor], Path]:
    """The tensors of `stem[.variant].safetensors` in a folder, sharded or not, and the file they are from."""
    suffix = f".{variant}" if variant else ""
    path, index = folder / f"{stem}{suffix}.safetensors", folder / f"{stem}.safetensors.index{suffix}.json"
    if path.exists() or not index.exists():
        return read_safetensors(path), path
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(map(is_file_name, names.values())):
        raise InputError(f"{index}: its weight_map must give each tensor a file of the same folder")
    parts = [read_safetensors(folder / name) for name in sorted({*names.values()})]
    tensors = {key: tensor for part in parts for key, tensor in part.items()}
    if tensors.keys() != names.keys() or sum(map(len, parts)) != len(names):
        raise InputError(f"{index}: the tensors of its files are not those that its weight_map says")
    return tensors, index


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Give a module exactly these weights. Nothing is changed unless every key and every shape is right.

    A module on the meta device takes the tensors themselves; another one copies them.

    Raises:
        InputError: naming the file `source`, the first key that is missing, superfluous or of another shape, and how
            many there are.
    """
    own = module.state_dict()
    problems = [f"{key} is missing" for key in own if key not in tensors]
    problems += [f"{key} is not part of this architecture" for key in tensors if key not in own]
    problems += [
        f"{key} is {_kind(tensors[key])} in the file and {_kind(own[key])} in this architecture"
        for key in own
        if key in tensors and _kind(tensors[key]) != _kind(own[key])
    ]
    if problems:
        more = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
        raise InputError(f"{source}: {problems[0]}{more}; the weights are of another architecture than the config.json")
    module.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in own.values()))


def _kind(value: Tensor) -> str:
    # In 8 bits weights are kept, not computed with.
    return f"{list(value.shape)}" + ("" if value.is_floating_point() and value.itemsize > 1 else f" of {value.dtype}")


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, name: str) -> dict[str, Tensor]:
    """The tensors on the CPU, floating-point ones in `dtype` (None: as they are).

    Raises:
        InputError: a value that is finite does not fit in `dtype`; `name` begins the message.
    """
    done = {}
    for key, value in tensors.items():
        done[key] = value.detach().to("cpu", dtype if value.is_floating_point() else None)
        if done[key].isinf().any() and not value.isinf().any():
            raise InputError(f"{name}: {key} does not fit in {dtype}: save in bfloat16 or float32")
    return done


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        SaveError: naming the path and the bytes needed; a file that was there before is untouched.
    """
    with _replacing(Path(path), len(data)) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` of a value as indented JSON; NaN and infinity, which are no JSON, are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all; errors as of `write_bytes`."""
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with _replacing(Path(path), sum(tensor.nbytes for tensor in plain.values())) as temporary:
        save_file(plain, temporary, dict(metadata or {}))


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[Path]:
    """A temporary file beside `path`, which is synced and then renamed onto it, or removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield temporary
            # safetensors makes a file of its own, which others may not read.
            temporary.chmod(os.fstat(file.fileno()).st_mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise SaveError(f"{path}: could not be saved ({reason}); {in_bytes(size)} are needed") from error
    finally:
        with suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink()
