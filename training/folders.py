"""A folder of image files, with metadata.jsonl or metadata.csv, with caption files beside them, or sorted into folders.

Names that begin with a dot are passed over, as programs leave them behind. Nothing outside the folder is read, though a
name or a link lead there: a data set that was copied from elsewhere does not choose among this machine's files.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_unet.errors import InputError

from .config import DataConfig

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
CAPTION_SUFFIXES = (".txt", ".caption")
MAX_TEXT = 1 << 24  # bytes of a caption, or of what is said of one sample
MAX_CELL = (1 << 31) - 1  # characters
METADATA = ("metadata.jsonl", "metadata.csv")
IMAGE, TEXT, LABEL = "file_name", "text", "folder"  # columns of a folder without metadata


@dataclass(frozen=True)
class Row:
    """One row of the metadata, or one image file."""

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class Folder:
    """Rows that name files within a folder."""

    folder: Path
    root: Path  # the same, links resolved
    rows: Sequence[Row]
    files: tuple[str, ...]  # columns that name files
    has_columns: bool  # of the user's naming, in metadata

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index].name

    def row(self, index: int) -> Mapping[str, Any]:
        row = self.rows[index]
        if row.fault:
            raise InputError(f"{row.name}: {row.fault}")
        return row.values

    def picture(self, index: int, column: str) -> Path:
        row = self.rows[index]
        file = (row.values or self.row(index)).get(column)  # a caption that is missing does not take the picture away
        if not isinstance(file, str) or not file or "\0" in file:
            raise InputError(f"{row.name}: no file name under {column!r}")
        try:
            if not (self.folder / file).resolve().is_relative_to(self.root):
                raise InputError(f"{row.name}: {file!r} lies outside the folder")
            (self.folder / file).stat()
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{row.name}: {file!r} is no file") from None
        except (OSError, ValueError, RuntimeError) as error:  # too long, not encodable, a circle of links
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise InputError(f"{row.name}: no file can have this name, or links lead in a circle ({reason})") from None
        return self.folder / file

    def unlisted(self) -> list[str]:
        """Images of the folder that its metadata does not list."""
        if not self.has_columns:
            return []
        listed = {os.path.normpath(self.folder / str(row.values.get(name))) for row in self.rows for name in self.files}
        return [_printable(path) for path in _images(self.folder) if os.path.normpath(path) not in listed]

    def stamp(self, index: int) -> str:
        states = [self.picture(index, column).stat() for column in self.files]
        return json.dumps([self.rows[index].values, [(state.st_size, state.st_mtime_ns) for state in states]])


def has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in METADATA)


def open_folder(folder: Path, config: DataConfig) -> Folder:
    """The samples of a folder. Raises InputError where there are none, or its metadata cannot be read as a whole."""
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"data.train_data_dir: {folder} has both {' and '.join(METADATA)}; take one of them away")
    if found:
        image = config.image_column or IMAGE
        rows = list(_read_jsonl(found[0], config) if found[0].suffix == ".jsonl" else _read_csv(found[0], config))
        files = (image, config.original_image_column) if config.original_image_column else (image,)
    else:
        rows, files = _read_images(folder, captioned=config.instance_prompt is None), (IMAGE,)
    if not rows:
        raise InputError(
            f"data.train_data_dir: {folder} has neither {' nor '.join(METADATA)} nor images with"
            f" {' or '.join(CAPTION_SUFFIXES)} files or in folders that name them"
        )
    return Folder(folder, folder.resolve(), rows, files, bool(found))


def _read_jsonl(path: Path, config: DataConfig) -> Iterator[Row]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, row {number}"
        try:
            values = json.loads(line.decode())  # bytes would be taken for UTF-16 by their look
        except (ValueError, RecursionError):
            yield Row(place, fault="the line is no JSON")
            continue
        if isinstance(values, dict):
            yield _row(place, values, config)
        else:
            yield Row(place, fault="the line is no JSON object")


def _read_csv(path: Path, config: DataConfig) -> Iterator[Row]:
    """Rows are counted as a spreadsheet shows them: the first is the names of the columns."""
    csv.field_size_limit(MAX_CELL)  # of all readers in the process, none of which needs a smaller one
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a UTF-8 CSV file ({error})") from None
    header = table[0] if table else []
    for number, cells in enumerate(table[1:], 2):
        if not cells:
            continue
        place = f"{path}, row {number}"
        if len(cells) > len(header):
            yield Row(place, fault=f"{len(cells)} cells under {len(header)} names of columns; quote those with commas")
            continue
        values: dict[str, Any] = dict(zip(header, cells, strict=False))
        values[config.caption_column] = _listed(values.get(config.caption_column))
        yield _row(place, values, config)


def _listed(cell: Any) -> Any:
    """The list in a cell of JSON text, "[...]"; any other text is itself a caption."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass
    return cell


def _row(place: str, values: Mapping[str, Any], config: DataConfig) -> Row:
    column = config.image_column or IMAGE
    file = values.get(column)
    if not isinstance(file, str) or not file or "\0" in file:
        return Row(place, fault=f"no file name under {column!r} (data.image_column)")
    used = (column, config.caption_column, config.label_column, config.original_image_column)
    return Row(f"{place}, {file!r}", {key: values[key] for key in used if key is not None and key in values})


def _read_images(folder: Path, captioned: bool) -> list[Row]:
    """A row for each image of the folder and those within it; `captioned` where a caption is needed."""
    images = _images(folder)
    beside = [next((c for s in CAPTION_SUFFIXES if (c := path.with_suffix(s)).is_file()), None) for path in images]
    sorted_into_folders = not any(beside) and all(path.parent != folder for path in images)
    rows, root = [], folder.resolve()
    for path, caption_file in zip(images, beside, strict=True):
        label = path.parent.name.replace("_", " ")
        values: dict[str, Any] = {IMAGE: str(path.relative_to(folder))}
        if path.parent != folder:
            values[LABEL] = label
        fault = None
        if captioned and sorted_into_folders:
            values[TEXT] = label
        elif captioned:
            values[TEXT], fault = _read_caption(path, caption_file, root)
        rows.append(Row(_printable(path), values, fault))
    return rows


def _images(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _read_caption(image: Path, file: Path | None, root: Path) -> tuple[str, str | None]:
    """The caption of an image, and what is wrong with it."""
    name = _printable(Path((file or image.with_suffix(CAPTION_SUFFIXES[0])).name))
    missing = f"no UTF-8 caption file {name}"
    if file is None:
        return "", missing
    if not file.resolve().is_relative_to(root):
        return "", f"the caption file {name} lies outside the folder"
    try:
        if file.stat().st_size > MAX_TEXT:
            return "", f"the caption file {name} has {file.stat().st_size} bytes; at most {MAX_TEXT} are read"
        return file.read_text(encoding="utf-8-sig"), None
    except (OSError, UnicodeDecodeError):
        return "", missing


def _printable(path: Path) -> str:
    """One line, whatever the name holds: line ends, bytes that are no UTF-8, a terminal's commands."""
    text = str(path)
    return text if text.isprintable() else repr(text)
