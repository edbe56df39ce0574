"""Data sets of `datasets` on the disk, of the hub, and streams: what was written comes back, each fault is one line."""

import io
import json
import logging
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_sources import PIXELS, fault, opened, png, settings, shown

from diffusion_unet.errors import SaveError
from training import tables
from training.config import DataConfig
from training.sources import open_source


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """datasets' own files stay in the test's folder, and its progress bars out of the way."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# ---- data sets -----------------------------------------------------------------------------------------------------


def table(count: int = 4, **more: Any) -> datasets.Dataset:
    """Pictures with embedded bytes, captions, labels of both kinds."""
    columns = {
        "image": [{"bytes": png(number), "path": None} for number in range(count)],
        "text": [[f"number {number}", "a number"] for number in range(count)],
        "kind": [number % 2 for number in range(count)],
        "code": list(range(count)),
        "before": [{"bytes": png(5), "path": None}] * count,
        **more,
    }
    features = {"image": datasets.Image(), "before": datasets.Image(), "kind": datasets.ClassLabel(names=["odd", "b"])}
    made = datasets.Dataset.from_dict(columns)
    return made.cast(datasets.Features({**made.features, **features}))


def saved(folder: Path) -> Path:
    table().save_to_disk(folder)
    return folder


def split_up(folder: Path) -> Path:
    datasets.DatasetDict({"train": table(), "test": table(1)}).save_to_disk(folder)
    return folder


def parquet(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    table().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table(1).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("# a data set\n")
    return folder


def one_file(folder: Path) -> Path:
    folder.mkdir()
    table().to_parquet(folder / "some [1] file.parquet")
    return folder / "some [1] file.parquet"


@pytest.mark.parametrize("make", [saved, split_up, parquet, one_file])
def test_data_sets_on_the_disk(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "data")
    source = opened(path, label_column="kind", original_image_column="before")
    assert len(source) == 4 and all(shown(source, index) for index in range(4))
    assert source.captions(3) == ["number 3", "a number"]
    assert [source.label(0), source.label(1)] == ["odd", "b"]
    assert np.array_equal(np.array(source.original(2)), PIXELS[5])
    assert source.name(2) == f"{path}, row 3"
    assert opened(path, label_column="code", instance_prompt="x").label(3) == "3"
    assert opened(path, caption_column="kind").captions(0) == ["odd"]
    stamps = {source.stamp(index) for index in range(4)} | {opened(path).stamp(0)}
    assert len(stamps) == 5 and opened(path).stamp(0) in stamps
    for key, column, part in (
        ("caption_column", "none", "has no column 'none'; it has image, text, kind, code, before"),
        ("label_column", "none", "has no column 'none'"),
        ("image_column", "code", "does not hold images"),
        ("original_image_column", "text", "does not hold images"),
    ):
        message = fault(lambda key=key, column=column: opened(path, **{key: column}))
        assert message.startswith(f"data.{key}: ") and part in message
    if make in (split_up, parquet):
        assert len(opened(path, split="test")) == 1
        message = fault(lambda: opened(path, split="none"))
        assert "split" in message and "none" in message and "test" in message
    else:
        assert fault(lambda: opened(path, split="test")) == f"data.split: {path} has no splits; take it out"


def test_parquet_of_other_programs(tmp_path: Path) -> None:
    for form in ("binary", "struct"):
        cells = [png(number) for number in range(3)]
        column = pyarrow.array(cells if form == "binary" else [{"bytes": cell, "path": "x.png"} for cell in cells])
        path = tmp_path / f"{form}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"jpg": column, "caption": ["a", "", None]}), path)
        source = opened(path, image_column="jpg", caption_column="caption")
        assert len(source) == 3 and all(shown(source, index) for index in range(3))
        assert source.captions(0) == ["a"]
        assert "row 2: the caption is empty" in fault(source.captions, 1)
        assert "row 3: no caption under 'caption'" in fault(source.captions, 2)
    path.write_bytes(b"PAR1 and no more")
    assert "cannot be read as a data set" in fault(opened, path)


def test_stamps_of_a_data_set_change_with_its_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table().to_parquet(path)
    before = opened(path).stamp(0)
    assert opened(path).stamp(0) == before
    table(text=["other"] * 4).to_parquet(path)
    source = opened(path)
    assert source.captions(0) == ["other"] and source.stamp(0) != before
    folder = saved(tmp_path / "saved")
    before = opened(folder).stamp(0)
    os.utime(next(folder.glob("*.arrow")), ns=(1, 1))  # a map over other files leaves datasets' own fingerprint
    assert opened(folder).stamp(0) != before


def test_paths_out_of_a_data_set_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(5))
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.png").write_bytes(png(0))
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    paths = [str(data / "0.png"), "0.png", str(tmp_path / "secret.png"), "../secret.png", str(data / "link.png"), "\0"]
    cells = [{"bytes": None, "path": path} for path in [*paths, "https://localhost/x.png", "n" * 300]]
    made = datasets.Dataset.from_dict({"image": [*cells, None], "text": ["x"] * 9})
    pyarrow.parquet.write_table(made.data.table, data / "train.parquet")
    source = opened(data)
    for index in (0, 1):
        assert np.array_equal(np.array(source.image(index)), PIXELS[0])
    for index in range(2, 9):
        assert f"row {index + 1}: the row holds no image" in fault(source.image, index)
    assert "holds no image" in fault(opened(data / "train.parquet").image, 0)  # a lone file has no folder of its own


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    cached = tmp_path / "hf" / "downloads" / "1.png"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(5))
    cells = [
        {"bytes": png(0), "path": None},
        *({"bytes": None, "path": str(p)} for p in (cached, tmp_path / "secret.png")),
    ]

    def load(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((arguments, options))
        made = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b", "c"]})
        return made.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = opened(None, dataset_name="someone/things", dataset_config_name="small", split="test")
    assert asked == [(("someone/things", "small"), {"split": "test"})]
    assert len(source) == 3 and shown(source, 0) and shown(source, 1) and source.name(2) == "someone/things, row 3"
    assert "holds no image" in fault(source.image, 2)


def test_a_hub_that_does_not_answer_is_one_line() -> None:
    message = fault(lambda: opened(None, dataset_name="someone/things"))
    assert message.startswith("data.dataset_name: someone/things cannot be read as a data set (")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a port at which nobody listens, and nothing says so beforehand."""
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("streaming", [None, "index"])
def test_without_a_network_one_line_comes_at_once(
    streaming: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s, to ask again"))
    for name in ("datasets", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)  # as far as caplog
    message = fault(lambda: opened(None, dataset_name="someone/things", streaming=streaming, cache_dir=str(tmp_path)))
    assert message == (
        "data.dataset_name: someone/things cannot be read as a data set (http://127.0.0.1:9 does not answer, and it is"
        " not in the caches of `datasets`)"
    )
    assert not caplog.records and datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_caches_serve(tmp_path: Path) -> None:
    parquet(tmp_path / "things")
    datasets.load_dataset(str(tmp_path / "things"))  # fills the caches
    (tmp_path / "hf" / "things").rename(tmp_path / "hf" / "someone___things")
    source = opened(None, dataset_name="someone/things")
    assert len(source) == 4 and all(shown(source, index) for index in range(4))


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    def load(*arguments: Any, **options: Any) -> None:
        assert datasets.config.HF_HUB_OFFLINE is False
        raise ConnectionError("a fault of its own")

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        server.timeout = 20
        thread = Thread(target=server.handle_request)
        thread.start()
        message = fault(lambda: opened(None, dataset_name="someone/things"))
        thread.join(30)
    assert asked and "(a fault of its own)" in message


def test_a_folder_in_the_place_of_a_hub_id(tmp_path: Path) -> None:
    source = opened(None, dataset_name=str(parquet(tmp_path / "data")), split="test")
    assert len(source) == 1 and shown(source, 0)


# ---- streams -------------------------------------------------------------------------------------------------------


def streamed(tmp_path: Path, **more: Any) -> DataConfig:
    if not (tmp_path / "data").exists():
        parquet(tmp_path / "data")
    name = {"dataset_name": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    return settings(None, streaming="index", **{**name, **more})


def test_a_stream_is_indexed_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHARD_BYTES", 2 * len(png(0)))
    told: list[tuple[int, int | None]] = []
    config = streamed(tmp_path, label_column="kind")
    source = open_source(config, 3, lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == [1, 2, 3, 4] and {total for _, total in told} <= {None, 4}
    assert len(source) == 4 and all(shown(source, index) for index in range(4))
    assert source.captions(2) == ["number 2", "a number"] and source.label(1) == "b"
    (folder,) = [path for path in (tmp_path / "cache" / "streams").iterdir() if path.is_dir()]
    assert [path.name for path in sorted(folder.iterdir())] == ["00000.arrow", "00001.arrow", "index.json"]
    assert json.loads((folder / "index.json").read_text())["rows"] == 4

    monkeypatch.setattr(tables, "open_stream", lambda config: pytest.fail("read again"))
    again = open_source(config, 3)
    assert [again.stamp(index) for index in range(4)] == [source.stamp(index) for index in range(4)]
    assert shown(again, 3)


def test_the_first_rows_of_a_stream(tmp_path: Path) -> None:
    assert len(open_source(streamed(tmp_path, max_train_samples=3), 3)) == 3
    assert len(open_source(streamed(tmp_path, max_train_samples=2), 3)) == 2
    assert "data.cache_dir" in fault(open_source, streamed(tmp_path, cache_dir=None), 3)
    assert "has no column 'none'" in fault(open_source, streamed(tmp_path, caption_column="none"), 3)


def test_a_stream_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, whole = streamed(tmp_path), tables.open_stream

    class Broken:
        def __init__(self, stream: Any) -> None:
            self.features, self.info, self.stream = stream.features, stream.info, stream

        def __iter__(self) -> Iterator[Any]:
            yield from self.stream.take(2)
            raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(tables, "open_stream", lambda config: Broken(whole(config)))
    assert "broke off after 2 rows (reset by peer); start again" in fault(open_source, config, 3)
    streams = tmp_path / "cache" / "streams"
    assert not [path for path in streams.iterdir() if path.is_dir()]
    monkeypatch.setattr(tables, "open_stream", whole)
    (key,) = [path.stem for path in streams.iterdir()]
    (streams / f"{key}.partial").mkdir()  # as a start that was killed leaves it
    (streams / f"{key}.partial" / "00007.arrow").write_bytes(b"half a shard")
    assert len(open_source(config, 3)) == 4


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    with pytest.raises(SaveError, match=r"^[^\n]*the stream could not be written[^\n]*$"):
        open_source(streamed(tmp_path), 3)


def test_pictures_that_a_stream_gives_as_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.png").write_bytes(png(5))
    own = "hf://datasets/someone/things@0123/"
    paths = [
        f"{own}0.png",
        f"zip://1.png::{own}all.zip",
        "hf://datasets/someone/else@0123/2.png",
        f"file://{tmp_path}/secret.png::{own}all.zip",
        f"zip://x::file://{tmp_path}/x.zip::{own}all.zip",
        f"zip://x::{own}all.zip::file://{tmp_path}/x.zip",
        f"{own}0.png::file://{tmp_path}/secret.png",
        "https://localhost/x.png",
        str(tmp_path / "secret.png"),
    ]
    cells = [{"bytes": None, "path": path} for path in paths]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    stream = datasets.Dataset.from_dict({"image": cells, "text": ["x"] * len(cells)}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: stream.to_iterable_dataset())
    fetched = []

    def fetch(path: str, mode: str) -> io.BytesIO:
        fetched.append(path)
        return io.BytesIO(png(len(fetched) - 1))

    monkeypatch.setattr("fsspec.open", fetch)
    config = settings(None, dataset_name="someone/things", streaming="index", cache_dir=str(tmp_path / "cache"))
    source = open_source(config, 3)
    assert fetched == paths[:2] and shown(source, 0) and shown(source, 1)
    for index in range(2, len(paths)):
        assert "holds no image" in fault(source.image, index)
