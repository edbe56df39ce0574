"""Checkpoints of a run: each a folder that is whole or absent, safetensors and JSON only.

    checkpoint-500/     model.safetensors, ema_*.safetensors, optimizer.safetensors
                        state.json      how far the run is, and what it may be resumed with
                        manifest.json   size and sha256 of every other file, written last

Everything is written to a hidden folder first and synced, then the folder is renamed, then its parent synced, and only
then are older ones removed. A folder under its final name is therefore complete; the manifest finds what happened to
it later.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_unet.checkpoint import read_safetensors, write_json, write_safetensors
from diffusion_unet.errors import InputError, SaveError, in_bytes
from diffusion_unet.model import sync_folder
from diffusion_unet.untrusted import Field, checked, is_file_name, read_json

FORMAT = 2
STATE, MANIFEST = "state.json", "manifest.json"
HIDDEN = ".unfinished-"  # also what is on its way out
REPLACED = ".replaced-"  # a checkpoint that the same step, saved again, is about to replace
UNFINISHED = (".*.tmp", ".tmp??????")  # names that files have until they are whole: ours, and those of safetensors
MAX_STATE_BYTES = 64 << 20  # some optimizers keep a number for each parameter
# Of state.json; the settings in `config` and the entries of `optimizer` are checked by those who take them.
STATE_FIELDS = {
    "step": Field(int, 0, 1 << 53),
    "seconds": Field(float),
    "look_due": Field(bool),
    "changes": Field(dict, listed=True),
    **dict.fromkeys(("levels", "optimizer", "config"), Field(dict)),
}
SPARE_BYTES = 1 << 20  # JSON, headers, directories


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read: `tensors` by file without suffix ("model", "optimizer", "ema_0.999")."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def averages(self) -> list[str]:
        """Names of the averages of the weights that it holds."""
        return [name.removeprefix("ema_") for name in self.tensors if name.startswith("ema_")]


def save(
    run: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], keep: int | None
) -> Path:
    """Writes `checkpoint-{step}` under `run`, then removes all but the newest `keep` (at least 2; None keeps all).

    Raises SaveError with the path and the bytes needed; then nothing is left behind, and older ones are untouched."""
    final = run / f"checkpoint-{step}"
    partial, replaced = run / f"{HIDDEN}{final.name}", run / f"{REPLACED}{final.name}"
    needed = SPARE_BYTES + sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    named = False
    try:
        run.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run).free
        if free < needed:
            sizes = f"{in_bytes(needed)} are needed and {in_bytes(free)} are free"
            raise SaveError(f"{final}: {sizes}: make room, and run this again")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(partial, {"format": FORMAT, "step": step, **state}, tensors)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(partial, final)
        named = True
        sync_folder(run)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        if named:  # but nobody knows whether the disk has it so
            with suppress(OSError):
                os.rename(final, partial)
        shutil.rmtree(partial, ignore_errors=True)
        _bring_back(run)
        if isinstance(error, SaveError):
            raise
        raise SaveError(
            f"{final}: could not be saved ({error.strerror or error}); {in_bytes(needed)} are needed"
        ) from error
    _retain(run, keep)
    return final


def _write(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, part in tensors.items():
        write_safetensors(folder / f"{name}.safetensors", part)
    write_json(folder / STATE, state)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(folder.iterdir())}
    sync_folder(folder)
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})
    sync_folder(folder)


def load(run: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None where it has none at all. `say` is told of each that is damaged.

    Raises InputError when there are checkpoints and every one is damaged."""
    candidates = whole_looking(run)
    for path in candidates:
        try:
            return read(path)
        except InputError as error:
            say(f"{error}; falling back to the checkpoint before it")
    if candidates:
        raise InputError(f"{run}: none of its {len(candidates)} checkpoints is whole: remove them to begin anew")
    return None


def read(path: Path) -> Checkpoint:
    """One checkpoint, every file compared with the manifest. Raises InputError, naming the file that is damaged."""
    manifest = read_json(path / MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or STATE not in files:
        raise InputError(f"{path / MANIFEST}: not a manifest of format {FORMAT}")
    tensors = {}
    for name, expected in files.items():
        file = path / name
        if not is_file_name(name) or not file.is_file():
            raise InputError(f"{path / ascii(name)[1:-1][:200]}: missing")
        if not isinstance(expected, dict) or file.stat().st_size != expected.get("bytes"):
            raise InputError(f"{file}: {file.stat().st_size} bytes long, not as in the manifest")
        if _digest(file) != expected.get("sha256"):
            raise InputError(f"{file}: damaged, its sha256 is not that of the manifest")
        if file.suffix == ".safetensors":
            tensors[file.stem] = read_safetensors(file)
    state = read_json(path / STATE, limit=MAX_STATE_BYTES)
    if checked(state, STATE_FIELDS, path / STATE).get("step") is None:
        raise InputError(f"{path / STATE}: no step in it")
    return Checkpoint(path, state, tensors)


def check_state(found: Checkpoint) -> None:
    """Raises InputError, naming the field, unless all that a run goes on from is in `found.state`."""
    source = found.path / STATE
    for name in STATE_FIELDS:
        if found.state.get(name) is None:
            raise InputError(f"{source}: no {name} in it")
    levels = checked(found.state["levels"], dict.fromkeys(("sums", "counts"), Field(float, listed=True)), source)
    if len(levels) < 2 or len(levels["sums"]) != len(levels["counts"]):
        raise InputError(f"{source}: levels needs sums and counts, as many of one as of the other")


def whole_looking(run: Path) -> list[Path]:
    """The checkpoint folders of a run by name, newest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def sweep(run: Path, keep: int | None = None) -> None:
    """Removes what a killed process left in the run folder, and all checkpoints but the newest, as `save` does.

    A checkpoint that was not replaced yet is kept. For the process that alone writes there. Raises SaveError."""
    try:
        _bring_back(run)
        for path in run.glob(f"{HIDDEN}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in unfinished(run):
            path.unlink()
        sync_folder(run)  # as a save that was killed would have done before it removed anything
    except OSError as error:
        raise SaveError(f"{run}: what a killed process left there cannot be removed ({error})") from error
    _retain(run, keep)


def unfinished(folder: Path) -> Iterator[Path]:
    """Files below a folder that have not got their names: they are being written, or never will be again."""
    for pattern in UNFINISHED:
        yield from (path for path in folder.rglob(pattern) if path.is_file())


def _retain(run: Path, keep: int | None) -> None:
    found = whole_looking(run)
    for old in found[max(keep, 2) :] if keep is not None else []:
        try:
            _remove(old)
        except OSError as error:
            raise SaveError(
                f"{old}: could not be removed ({error.strerror}); {found[0]} is whole: remove the old one, and go on"
            ) from error


def _bring_back(run: Path) -> None:
    for path in run.glob(f"{REPLACED}*"):
        final = run / path.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, final)


_NAME = re.compile(r"checkpoint-(\d+)")


def _remove(path: Path) -> None:
    """First out of sight under a name that is no checkpoint's: half a checkpoint is never seen."""
    hidden = path.with_name(f"{HIDDEN}old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raises InputError, naming the first key, unless both have the same keys, shapes and dtypes."""
    for key in [*expected, *given]:
        if key not in given:
            raise InputError(f"{source}: {key} is missing")
        if key not in expected:
            raise InputError(f"{source}: {key} is not part of this run")
        if (expected[key].shape, expected[key].dtype) != (given[key].shape, given[key].dtype):
            was, now = ([list(tensor.shape), str(tensor.dtype)] for tensor in (given[key], expected[key]))
            raise InputError(f"{source}: {key} is {was} in the checkpoint and {now} in this run")
