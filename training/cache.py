"""Tensors computed once and kept on disk: moments of an autoencoder, hidden states of a text encoder.

    FOLDER/0123456789abcdef/        the first digits of the fingerprint of all that the tensors depend on
        shard-00000.safetensors     tensors "<entry>.<name>" of the entries 0 to shard_size - 1; and so on
        manifest.json               written once every shard is there

A shard is written whole or not at all, so that a build that was stopped goes on with the shards that are missing. What
depends on anything else lies under another name, and is never read. One folder serves one kind of tensors.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion_unet.checkpoint import write_json, write_safetensors
from diffusion_unet.conditioning import PromptEncoder
from diffusion_unet.errors import InputError, SaveError, in_bytes
from diffusion_unet.untrusted import read_json

from .checkpoint import unfinished

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_SIZE = 256  # entries
DIGITS = 16  # of the fingerprint, in the name of a store
OPEN_SHARDS = 1024  # kept open for reading; each takes some 50 kB for its header, and none of its tensors
ABANDONED = 3600  # seconds after which an unfinished file is nobody's: another process may be writing a younger one

Row = dict[str, Tensor]  # the tensors of one entry


def fingerprint(*parts: Any) -> str:
    """sha256 (hex) over settings and digests, whatever JSON can hold; TypeError or ValueError for others."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def module_digest(module: nn.Module) -> str:
    """sha256 (hex) over all weights, as they are in memory; reads each of them once."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Store:
    """A store of `count` entries in `path`, each some named tensors, whose shapes may differ between entries.

    It is read by any number of threads at once.
    """

    def __init__(self, path: Path, fingerprint: str, count: int, shard_size: int = SHARD_SIZE):
        self.path, self.fingerprint, self.count, self.shard_size = path, fingerprint, count, shard_size
        self._opened = lru_cache(OPEN_SHARDS)(_open)

    def __len__(self) -> int:
        return self.count

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shard(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def entries(self, number: int) -> range:
        """The entries of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.count))

    def manifest(self) -> dict[str, Any]:
        """What manifest.json says of it."""
        names = {"fingerprint": self.fingerprint, "count": self.count, "shard_size": self.shard_size}
        return {"format": FORMAT, **names}

    def rows(self, entries: Sequence[int]) -> list[Row]:
        """The tensors of these entries, on the CPU, each the caller's own. Raises InputError for a damaged shard."""
        rows = []
        for entry in entries:
            if not 0 <= entry < self.count:
                raise IndexError(f"entry {entry} of a store of {self.count}")
            path = self.shard(entry // self.shard_size)
            try:
                file, names = self._opened(path)
                # It is a view of the mapped file: copied, so that this thread is the one that waits for the disk.
                rows.append({name: file.get_tensor(f"{entry}.{name}").clone() for name in names})
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: cannot be read ({error}); remove it, and it is made again") from None
        return rows

    def whole(self, number: int) -> bool:
        """Whether a shard is there, as long as its header says, and holds its entries only. Reads no tensors."""
        try:
            file, names = _open(self.shard(number))
        except (OSError, SafetensorError):
            return False
        keys = {f"{entry}.{name}" for entry in self.entries(number) for name in names}
        return (file.metadata() or {}).get("fingerprint") == self.fingerprint and {*file.keys()} == keys


def find(folder: Path, fingerprint: str) -> Store | None:
    """The store of `fingerprint` under `folder`, where one has been finished."""
    path = folder / fingerprint[:DIGITS]
    try:
        manifest = read_json(path / MANIFEST)
    except InputError:
        return None
    count, shard_size = manifest.get("count"), manifest.get("shard_size")
    if not isinstance(count, int) or not isinstance(shard_size, int) or shard_size < 1:
        return None
    store = Store(path, fingerprint, count, shard_size)
    return store if manifest == store.manifest() else None


def build(
    folder: Path,
    fingerprint: str,
    count: int,
    compute: Callable[[Sequence[int]], list[Row]],
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
    shard_size: int = SHARD_SIZE,
    watch: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
) -> Store:
    """The store of `fingerprint` under `folder`; what is missing of it is computed, what is there and whole is not.

    compute: entries, at most `shard_size` neighbours, to the tensors of each, which have the same names in all entries.
    rank, world: process `rank` of `world` computes shards rank, rank + world, ...; all see the same `folder`.
    wait: returns once every process has called it.
    watch: may show the progress of this process, an iterator over its missing entries and their count.

    Raises SaveError, naming the path and the bytes needed, where the disk cannot hold it all.
    """
    store = Store(folder / fingerprint[:DIGITS], fingerprint, count, shard_size)
    missing = [number for number in range(rank, store.shards, world) if not store.whole(number)]
    if rank == 0:
        _sweep(store.path)
    if missing:
        _make_way(store, missing)
    entries = _compute(store, missing, compute)
    total = sum(len(store.entries(number)) for number in missing)
    for _ in watch(entries, total) if watch else entries:
        pass
    wait()
    if rank == 0:
        found = find(folder, fingerprint)
        if found is None or found.manifest() != store.manifest():  # a finished one may lie where nothing can be written
            write_json(store.path / MANIFEST, store.manifest())
    wait()
    return store


def others(folder: Path, fingerprint: str) -> dict[Path, int]:
    """Stores under `folder` that are not of this fingerprint, and the bytes of each: what may be removed."""
    paths = [path for path in folder.glob("*") if _NAME.fullmatch(path.name) and path.name != fingerprint[:DIGITS]]
    return {path: sum(file.stat().st_size for file in path.glob("*") if file.is_file()) for path in sorted(paths)}


@torch.no_grad()
def text_rows(text: PromptEncoder, captions: Sequence[str], device: torch.device | str, batch: int) -> list[Row]:
    """What `text` makes of each caption: `context` [L, D], and `mask` [L] and `pooled` [P] if it gives them.

    In the encoder's own dtype, on `device`, where it is; captions that are too long are cut, as in training. `batch`
    captions are read at a time, and equal ones once. Dropout is off.
    """
    unique = list(dict.fromkeys(captions))
    found: dict[str, Row] = {}
    training = text.training
    text.eval()
    try:
        for start in range(0, len(unique), batch):
            part = unique[start : start + batch]
            ids, _ = text.tokenize(part)
            made = text(ids.to(device))
            fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
            for place, caption in enumerate(part):
                found[caption] = {name: value[place] for name, value in fields.items() if value is not None}
    finally:
        text.train(training)
    return [found[caption] for caption in captions]


_NAME = re.compile(f"[0-9a-f]{{{DIGITS}}}")


def _open(path: Path) -> tuple[Any, list[str]]:
    """A shard, and the names of the tensors that each of its entries has."""
    file = safe_open(path, framework="pt")
    return file, sorted({key.partition(".")[2] for key in file.keys()})  # noqa: SIM118


def _compute(store: Store, missing: Sequence[int], compute: Callable[[Sequence[int]], list[Row]]) -> Iterator[int]:
    """Writes these shards, and yields each entry that is done."""
    for number in missing:
        entries = store.entries(number)
        rows = compute(entries)
        if len(rows) != len(entries) or len({frozenset(row) for row in rows}) != 1 or not rows[0]:
            raise ValueError(f"{len(rows)} rows for {len(entries)} entries, or their tensors are not named alike")
        # Copied: tensors of several rows may share their memory, which a file cannot.
        tensors = {
            f"{entry}.{name}": tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for entry, row in zip(entries, rows, strict=True)
            for name, tensor in row.items()
        }
        if number == missing[0]:
            _check_room(store, sum(tensor.nbytes for tensor in tensors.values()) / len(entries))
        write_safetensors(store.shard(number), tensors, {"format": "pt", "fingerprint": store.fingerprint})
        yield from entries


def _make_way(store: Store, missing: Sequence[int]) -> None:
    """The store's folder, without these shards where they are damaged: what is not there counts as bytes needed."""
    try:
        store.path.mkdir(parents=True, exist_ok=True)
        for number in missing:
            store.shard(number).unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"{store.path}: cannot be written ({error.strerror}): take another data.cache_dir") from error


def _check_room(store: Store, entry_bytes: float) -> None:
    """Raises SaveError unless the disk can hold what is missing of the store, by all processes."""
    missing = [number for number in range(store.shards) if not store.shard(number).exists()]
    needed = round(entry_bytes * sum(len(store.entries(number)) for number in missing))
    free = shutil.disk_usage(store.path).free
    if free < needed:
        sizes = f"{in_bytes(needed)} are needed and {in_bytes(free)} are free"
        raise SaveError(f"{store.path}: {sizes}: make room, or take another data.cache_dir")


def _sweep(path: Path) -> None:
    """Removes what builds that were killed left half written."""
    for file in unfinished(path):
        with suppress(OSError):  # another process may just have finished it
            if time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()
