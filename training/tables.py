"""Data sets of Hugging Face's `datasets`: saved by save_to_disk, in parquet files, from the hub, or a stream of it.

`datasets` reads them, with Image(decode=False): decoding is ours. Of a picture that is kept as a path and not as bytes,
the file is read only where it lies in the data set's own folder or, for one from the hub, in the hub's caches (or the
stream's own repository): otherwise whoever made the data set would choose among the files of this machine.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_unet.errors import InputError, SaveError

from .config import DataConfig

SAVED, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"  # in a folder that save_to_disk has written
IMAGE = "image"
SHARD_BYTES = 1 << 28  # of pictures in one file of a stream's index
INDEX = "index.json"  # in a stream's folder of shards: what they hold, for a person
WINDOW = 1024  # rows of a stream that is not indexed which are looked at before the first step
STREAMED = "of a stream, not known"  # in the place of the fingerprint of images and captions
PATIENCE = 10  # seconds in which the hub has to answer, as its own library has it


@dataclass(frozen=True)
class Table:
    """The used columns of a datasets.Dataset."""

    title: str
    pictures: Mapping[str, Any]  # column -> datasets.Dataset of that column, undecoded
    texts: Any  # datasets.Dataset of the other columns; None without any
    roots: tuple[Path, ...]  # where files may lie whose paths the rows give; a relative path begins at the first
    fingerprint: str
    names: Sequence[str] = ()  # of rows out of their order; those of others are their numbers

    def __len__(self) -> int:
        return len(next(iter(self.pictures.values())))

    def name(self, index: int) -> str:
        return f"{self.title}, {self.names[index] if self.names else f'row {index + 1}'}"

    def row(self, index: int) -> Mapping[str, Any]:
        """The values; a ClassLabel by its name."""
        if self.texts is None:
            return {}
        values = self._cells(self.texts, index)
        for column, value in values.items():
            names = getattr(self.texts.features[column], "names", None)
            if names and isinstance(value, int):
                values[column] = names[value] if 0 <= value < len(names) else None  # -1 is "not known"
        return values

    def picture(self, index: int, column: str) -> Path | bytes:
        cell = self._cells(self.pictures[column], index)[column]
        content = cell and (cell["bytes"] or _inside(cell["path"], self.roots))
        if not content:
            raise InputError(
                f"{self.name(index)}: the row holds no image in column {column!r} (only images saved with the data set"
                " are read, not paths out of it)"
            )
        found: Path | bytes = content
        return found

    def stamp(self, index: int) -> str:
        return f"{self.fingerprint} {index}"

    def _cells(self, rows: Any, index: int) -> dict[str, Any]:
        try:
            return dict(rows[index])
        except (OSError, ValueError) as error:  # text that is no UTF-8, and what Arrow says of damaged files
            raise InputError(f"{self.name(index)}: the row cannot be read ({_line(error)})") from None


def is_table(path: Path) -> bool:
    """Whether a path is a data set that `open_table` opens."""
    if path.is_dir():
        saved = any((path / name).is_file() for name in (SAVED, SAVED_SPLITS))
        return saved or any(path.glob("*.parquet")) or any(path.glob("*/*.parquet"))
    return path.suffix == ".parquet" and path.is_file()


def has_splits(path: Path) -> bool:
    """Whether `data.split` chooses among the rows of the data set at a path."""
    return path.is_dir() and is_table(path) and not (path / SAVED).is_file()


def open_table(config: DataConfig, progress: Callable[[int, int | None], None] | None = None) -> Table:
    """The data set that data.train_data_dir or data.dataset_name names; of a pure stream the first rows. Raises
    InputError, SaveError."""
    import datasets

    if config.streaming == "index":
        rows = datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(file)) for file in index_stream(config, progress)]
        )
    else:
        rows = first_rows(config) if config.streaming == "pure" else _load(config)
    if len(rows) == 0:
        raise InputError(f"{_setting(config)}: {config.train_data_dir or config.dataset_name} has no rows")
    return table_of(config, rows)


def table_of(config: DataConfig, rows: Any, names: Sequence[str] = ()) -> Table:
    """The used columns of a datasets.Dataset. names: of its rows, where these are out of their order. Raises
    InputError."""
    if config.train_data_dir is not None:
        title, path = config.train_data_dir, Path(config.train_data_dir)
        roots: tuple[Path, ...] = (path,) if path.is_dir() else ()
    else:
        title, roots = str(config.dataset_name), hub_roots(config)
    state = [(file["filename"], os.stat(file["filename"])) for file in rows.cache_files]
    parts = [rows._fingerprint, *((Path(name).name, found.st_size, found.st_mtime_ns) for name, found in state)]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    pictures, texts = used_columns(config, rows.features)
    undecoded = {column: rows.select_columns([column]).cast_column(column, _undecoded()) for column in pictures}
    return Table(title, undecoded, rows.select_columns(texts) if texts else None, roots, fingerprint, names)


def used_columns(config: DataConfig, features: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The columns of pictures, and those of captions and labels. Raises InputError where one is missing."""
    title = config.train_data_dir or config.dataset_name
    wanted = {
        "image_column": config.image_column or IMAGE,
        "original_image_column": config.original_image_column,
        "caption_column": config.caption_column if config.instance_prompt is None else None,
        "label_column": config.label_column,
    }
    for key, column in wanted.items():
        if column is not None and column not in features:
            raise InputError(f"data.{key}: {title} has no column {column!r}; it has {', '.join(features)}")
        if column is not None and "image" in key and not _holds_images(features[column]):
            raise InputError(f"data.{key}: column {column!r} of {title} does not hold images")
    pictures = [column for key, column in wanted.items() if column is not None and "image" in key]
    return pictures, list(dict.fromkeys(c for key, c in wanted.items() if c is not None and "image" not in key))


def _holds_images(feature: Any) -> bool:
    """Pictures, or what parquet files of other programs keep them in: bytes alone, or a struct of bytes and path."""
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)


def _setting(config: DataConfig) -> str:
    return "data.train_data_dir" if config.train_data_dir is not None else "data.dataset_name"


def _load(config: DataConfig) -> Any:
    import datasets

    if config.train_data_dir is None:
        return _from_hub(config)
    title, path = config.train_data_dir, Path(config.train_data_dir)
    try:
        if path.is_file():
            rows = datasets.load_dataset("parquet", data_files={"train": glob.escape(str(path))}, split="train")
        elif any((path / name).is_file() for name in (SAVED, SAVED_SPLITS)):
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(str(path), split=config.split)
    except Exception as error:  # a dozen of readers raise nearly everything
        raise InputError(f"data.train_data_dir: {title} cannot be read as a data set ({_line(error)})") from error
    if isinstance(rows, datasets.DatasetDict):
        if config.split not in rows:
            raise InputError(f"data.split: {title} has no split {config.split!r}; it has {', '.join(rows)}")
        rows = rows[config.split]
    return rows


def _from_hub(config: DataConfig, **more: Any) -> Any:
    """`data.dataset_name` by datasets.load_dataset.

    It asks a hub that does not answer for most of a minute, warning all the while, before it looks into its caches;
    told that there is none, it looks there at once. Raises InputError."""
    import datasets

    title, as_set = config.dataset_name, datasets.config.HF_HUB_OFFLINE
    silent = not as_set and not Path(str(title)).is_dir() and not _hub_answers()
    datasets.config.HF_HUB_OFFLINE = as_set or silent
    try:
        return datasets.load_dataset(title, config.dataset_config_name, split=config.split, **more)
    except Exception as error:  # as in _load
        reason = _line(error)
        if silent:
            reason = f"{datasets.config.HF_ENDPOINT} does not answer, and it is not in the caches of `datasets`"
        raise InputError(f"data.dataset_name: {title} cannot be read as a data set ({reason})") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = as_set


def _hub_answers() -> bool:
    import datasets
    from huggingface_hub import get_session

    try:
        get_session().head(datasets.config.HF_ENDPOINT, timeout=PATIENCE)
    except Exception:  # of one of three libraries of HTTP, by the version
        return False
    return True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def hub_roots(config: DataConfig) -> tuple[Path, ...]:
    """Where the files of a data set from the hub may lie; of a folder in the place of a hub id, that folder."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(str(config.dataset_name)).is_dir():
        return (Path(str(config.dataset_name)),)
    return Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)


def _inside(path: str | None, roots: tuple[Path, ...]) -> Path | None:
    try:
        found = (roots[0] / path).resolve() if path and roots else None
        inside = found is not None and any(found.is_relative_to(root.resolve()) for root in roots)
        return found if inside and found is not None and found.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, not encodable, a circle of links
        return None


# ---- streams -------------------------------------------------------------------------------------------------------


def open_stream(config: DataConfig) -> Any:
    """The hub's data set as a datasets.IterableDataset of the used columns, undecoded. Raises InputError."""

    stream = _from_hub(config, streaming=True)
    try:
        if stream.features is None:  # the hub does not know them, the first rows do
            stream = stream._resolve_features()
    except Exception as error:  # as in _load
        title = config.dataset_name
        raise InputError(f"data.dataset_name: {title} cannot be read as a data set ({_line(error)})") from error
    pictures, texts = used_columns(config, stream.features)
    stream = stream.select_columns([*pictures, *texts])
    for column in pictures:
        stream = stream.cast_column(column, _undecoded())
    return stream if config.max_train_samples is None else stream.take(config.max_train_samples)


def index_stream(config: DataConfig, progress: Callable[[int, int | None], None] | None = None) -> list[Path]:
    """Writes a stream's rows to Arrow files in data.cache_dir, unless they are there, and returns the files in order.

    The files are there whole or not at all, and the next start uses them as they are, so that it trains on the same
    rows though the hub's have changed: deleting the folder asks for these. Processes that share the folder wait for the
    one that writes. progress: is told (rows written, rows in all or None). Raises InputError, SaveError."""
    import datasets
    from filelock import FileLock

    if config.cache_dir is None:
        raise InputError("data.cache_dir: data.streaming writes its shards there; name a folder")
    names = ("dataset_name", "dataset_config_name", "split", "max_train_samples", "image_column", "caption_column")
    used = [getattr(config, name) for name in (*names, "label_column", "original_image_column", "instance_prompt")]
    key = hashlib.sha256(json.dumps(used).encode()).hexdigest()[:16]
    folder = Path(config.cache_dir) / "streams" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                partial = folder.with_name(f"{key}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
                try:
                    stream = open_stream(config)
                    partial.mkdir()
                    count = _write_shards(config, stream, partial, progress)
                    about = {"rows": count, "data": used, "datasets": datasets.__version__}
                    (partial / INDEX).write_text(json.dumps(about, indent=2) + "\n")
                    _sync(partial)
                    os.rename(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or _line(error)
        raise SaveError(
            f"{folder}: the stream could not be written ({reason}); it needs the room of all pictures"
        ) from error
    return sorted(folder.glob("*.arrow"))


def _write_shards(
    config: DataConfig, stream: Any, folder: Path, progress: Callable[[int, int | None], None] | None
) -> int:
    from datasets.arrow_writer import ArrowWriter

    pictures, _ = used_columns(config, stream.features)
    split = (stream.info.splits or {}).get(config.split)
    total = min(filter(None, (split and split.num_examples, config.max_train_samples)), default=None)
    writer, shards, room, count = None, 0, 0, 0
    try:
        for count, row in enumerate(stream_rows(config, stream, "start again"), 1):
            if writer is None:
                writer = ArrowWriter(path=str(folder / f"{shards:05}.arrow"), features=stream.features)
                shards, room = shards + 1, SHARD_BYTES
            writer.write(row)
            room -= _size(row, pictures)
            if room <= 0:
                writer.finalize()
                writer = None
            if progress:
                progress(count, total)
        if writer is not None:
            writer.finalize()
            writer = None
    finally:
        if writer is not None:
            writer.close()
    if count == 0:
        raise InputError(f"data.dataset_name: {config.dataset_name} has no rows")
    return count


def first_rows(config: DataConfig) -> Any:
    """The first rows of a stream, as a datasets.Dataset in memory: WINDOW, or as many as have SHARD_BYTES of pictures.

    Raises InputError."""
    import datasets

    stream = open_stream(config)
    pictures, _ = used_columns(config, stream.features)
    rows: list[dict[str, Any]] = []
    room = SHARD_BYTES
    for row in stream_rows(config, stream, "start again"):
        rows.append(row)
        room -= _size(row, pictures)
        if len(rows) == WINDOW or room <= 0:
            break
    return datasets.Dataset.from_list(rows, features=stream.features)


def stream_rows(config: DataConfig, stream: Any, remedy: str) -> Iterator[dict[str, Any]]:
    """The rows of a stream, their pictures as bytes; None for one that has none that may be read.

    remedy: what to do where it breaks off, which is an InputError."""
    pictures, _ = used_columns(config, stream.features)
    roots, count, rows = hub_roots(config), 0, iter(stream)
    while True:
        try:
            row = dict(next(rows))
            for column in pictures:
                content = _fetch(row[column], str(config.dataset_name), roots)
                row[column] = {"bytes": content, "path": row[column]["path"]} if content else None
        except StopIteration:
            return
        except Exception as error:  # as in _load
            raise InputError(
                f"data.dataset_name: the stream of {config.dataset_name} broke off after {count} rows"
                f" ({_line(error)}); {remedy}"
            ) from error
        count += 1
        yield row


def _size(row: Mapping[str, Any], pictures: Sequence[str]) -> int:
    return sum(len(row[column]["bytes"]) for column in pictures if row[column])


def _fetch(cell: Any, repository: str, roots: tuple[Path, ...]) -> bytes | None:
    import fsspec  # type: ignore[import-untyped]

    if not cell or cell["bytes"]:
        return cell and cell["bytes"]
    path = str(cell["path"] or "")
    own = (f"hf://datasets/{repository}@", f"hf://datasets/{repository}/")
    archive, _, rest = path.partition("::")
    remote = rest if archive.startswith("zip://") else path
    if remote.startswith(own) and "::" not in remote:
        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
        return content
    file = _inside(path, roots)
    return None if file is None else file.read_bytes()


def _sync(folder: Path) -> None:
    """Onto the disk before the folder gets its name, which says that it is whole."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
