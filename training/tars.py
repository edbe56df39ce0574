"""Webdataset tars: the members of one sample have one name up to the first dot, as in 0001.jpg, 0001.txt, 0001.json.

Images, .txt and .json members are read, where they lie in the tar, and all others passed over: nothing is unpacked to
disk, so that links, devices and names with .. in them lead nowhere, and nothing is unpickled.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from diffusion_unet.errors import InputError

from .config import DataConfig
from .decoder import MEMORY
from .folders import IMAGE_SUFFIXES, MAX_TEXT

IMAGE = ""  # the column of an image whose name has nothing but its suffix after the first dot
TEXT, JSON = ".txt", ".json"


class Span(NamedTuple):
    """Where a member's bytes are in the tar."""

    offset: int
    size: int


@dataclass(slots=True)
class Entry:
    """The members of one sample."""

    tar: Path
    stamp: str  # of the tar
    key: str
    images: dict[str, Span] = field(default_factory=dict)  # by what stands between the first dot and the suffix
    text: Span | None = None
    json: Span | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Tars:
    """The samples of tars, in the order of the tars' names and of their members."""

    entries: Sequence[Entry]
    caption: str  # the column that a .txt member stands for

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return f"{self.entries[index].tar}, sample {self.entries[index].key!r}"

    def row(self, index: int) -> Mapping[str, Any]:
        """The .json member; its .txt member is the caption where that has none."""
        entry, values = self.entries[index], {}
        if entry.json is not None:
            try:
                values = json.loads(self._read(index, entry.json))
            except (ValueError, RecursionError):
                raise InputError(f"{self.name(index)}: its .json member is no JSON") from None
            if not isinstance(values, dict):
                raise InputError(f"{self.name(index)}: its .json member is no JSON object")
        if entry.text is not None and self.caption not in values:
            try:
                values[self.caption] = self._read(index, entry.text).decode("utf-8-sig")
            except UnicodeDecodeError:
                raise InputError(f"{self.name(index)}: its .txt member is no UTF-8") from None
        return values

    def picture(self, index: int, column: str) -> bytes:
        entry = self.entries[index]
        span = entry.images.get(_column(column))
        if span is None:
            wanted = f" {column!r}" if column else ", such as .jpg"
            others = ", ".join(f"{other}.*" for other in entry.images)
            raise InputError(f"{self.name(index)}: no image{wanted}" + (f"; it has {others}" if others else ""))
        return self._read(index, span, MEMORY)

    def stamp(self, index: int) -> str:
        entry = self.entries[index]
        return json.dumps([entry.stamp, entry.images, entry.text, entry.json])

    def _read(self, index: int, span: Span, limit: int = MAX_TEXT) -> bytes:
        """Opened for each read, so that threads share nothing and thousands of tars hold no files open."""
        entry = self.entries[index]
        if entry.fault:
            raise InputError(f"{self.name(index)}: {entry.fault}")
        if span.size > limit:
            raise InputError(f"{self.name(index)}: a member of {span.size} bytes; at most {limit} are read")
        try:
            with open(entry.tar, "rb") as file:
                file.seek(span.offset)
                content = file.read(span.size)
        except OSError as error:
            raise InputError(f"{self.name(index)}: {entry.tar} cannot be read ({error.strerror})") from None
        if len(content) != span.size:
            raise InputError(f"{self.name(index)}: {entry.tar} has become shorter")
        return content


def open_tars(paths: Sequence[Path], config: DataConfig) -> Tars:
    """The samples of tars, which are read through once. Raises InputError where one is damaged, or none has samples."""
    entries = [entry for path in paths for entry in _index(path)]
    if not any(entry.images for entry in entries):
        raise InputError(f"data.train_data_dir: {config.train_data_dir} holds no .tar file with images in it")
    return Tars(entries, config.caption_column)


def _index(path: Path) -> list[Entry]:
    entries: dict[str, Entry] = {}
    try:
        state = path.stat()
        for name, span in _members(path, state.st_size):
            folder, _, file = name.rpartition("/")
            stem, _, rest = file.partition(".")
            kind = PurePosixPath(file).suffix.lower()
            if not stem or kind not in (TEXT, JSON, *IMAGE_SUFFIXES):
                continue
            key = f"{folder}/{stem}" if folder else stem
            entry = entries.setdefault(key, Entry(path, f"{state.st_size} {state.st_mtime_ns}", key))
            _add(entry, kind, _column(rest), span)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path}: cannot be read as a tar that is not compressed ({error})") from None
    return list(entries.values())


def _add(entry: Entry, kind: str, column: str, span: Span) -> None:
    if kind == TEXT:
        twice, entry.text = entry.text is not None, span
    elif kind == JSON:
        twice, entry.json = entry.json is not None, span
    else:
        twice, entry.images[column] = column in entry.images, span
    if twice:
        entry.fault = f"two members {column or kind}, of which only one can be meant"


def _members(path: Path, size: int) -> Iterator[tuple[str, Span]]:
    """Names and places of the plain files. Raises InputError where the tar is cut off or damaged."""
    with tarfile.open(path, "r:") as tar:
        end = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it remembers all of millions
            if member.size < 0 or member.offset < end or member.offset_data + member.size > size:
                raise InputError(f"{path}: damaged at byte {member.offset}, or cut off: copy it again")
            end = member.offset_data
            if member.isreg() and not member.issparse():  # what a sparse one says of its size is not what is stored
                yield member.name, Span(member.offset_data, member.size)
        with open(path, "rb") as file:  # a reader takes a damaged header for the end, where zeros should be
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise InputError(f"{path}: damaged at byte {tar.offset}: copy it again")


def _column(name: str) -> str:
    """A name as it stands after the first dot, or as the settings give it, without an image's suffix."""
    *rest, last = name.split(".")
    return ".".join(rest) if f".{last.lower()}" in IMAGE_SUFFIXES else name
