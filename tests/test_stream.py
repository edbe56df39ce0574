"""Training on a stream itself: which rows come, what is passed over, and what of a run goes on exactly."""

import dataclasses
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import final, metrics, tiny_config

from diffusion_unet.errors import InputError, Stopped
from diffusion_unet.images import to_array
from diffusion_unet.model import DiffusionModel
from diffusion_unet.random import Purpose, normal
from training import footprint, stream, tables, train
from training.batches import Batch
from training.config import Config
from training.engine import make_accelerator
from training.exporting import export
from training.loop import Trainer
from training.preflight import check
from training.start import start
from training.stream import StreamBatches

ROWS = 13


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(footprint, "_activations", lambda *given: 1)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(number: int) -> bytes:
    """10 x 8 pixels of a colour that tells which row it is."""
    file = io.BytesIO()
    Image.new("RGB", (10, 8), (10 * number, 255 - 10 * number, 60)).save(file, "PNG")
    return file.getvalue()


def parquet(folder: Path, files: int = 1, bad: tuple[int, ...] = (), count: int = ROWS) -> Path:
    """`count` rows in so many files; those in `bad` have no picture that could be decoded."""
    folder.mkdir()
    rows = [
        {
            "image": {"bytes": b"no picture" if number in bad else png(number), "path": f"{number}.png"},
            "text": f"row {number}",
        }
        for number in range(count)
    ]
    for file in range(files):
        made = datasets.Dataset.from_list(rows[file::files]).cast_column("image", datasets.Image())
        made.to_parquet(folder / f"train-{file:05}-of-{files:05}.parquet")
    return folder


def settings(folder: Path, *overrides: str, **train: Any) -> Config:
    """A run on `folder`/data."""
    own = ["train_data_dir=null", f"dataset_name={folder / 'data'}", "streaming=pure", "random_flip=false"]
    own += ["caption_dropout=0", "max_bad_fraction=0.5"]
    return tiny_config(folder, "", *(f"--data.{one}" for one in own), *overrides, **train)


def begun(config: Config, rank: int = 0, world: int = 1, said: list[str] | None = None) -> StreamBatches:
    lines: list[str] = [] if said is None else said
    dataset, model, _ = start(config, make_accelerator(config), lines.append)
    return StreamBatches(config, dataset, model, rank, world, say=lines.append)


def shown(batch: Batch) -> list[int]:
    """Which rows the images of a batch are of."""
    assert batch.images is not None
    return [round(red / 10) for red in batch.images[:, 4, 4, 0].tolist()]


def taken(batches: StreamBatches, steps: int, first: int = 0) -> list[int]:
    return [row for batch in batches.ahead(first, first + steps) for row in shown(batch)]


# ---- which rows ----------------------------------------------------------------------------------------------------


def test_an_epoch_is_every_row_once_and_the_next_is_in_another_order(tmp_path: Path) -> None:
    parquet(tmp_path / "data")
    batches = begun(settings(tmp_path, "--data.shuffle_buffer=5"))
    rows = taken(batches, 10)  # 40 images
    epochs = [rows[:ROWS], rows[ROWS : 2 * ROWS], rows[2 * ROWS : 3 * ROWS]]
    assert all(sorted(epoch) == [*range(ROWS)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and sorted(epochs[0]) != epochs[0]
    assert taken(batches, 10) == rows  # from the same step, the same order


@pytest.mark.parametrize("files", [1, 2])
def test_two_processes_share_the_rows(tmp_path: Path, files: int) -> None:
    """By rows where there is one file, by files where there are two."""
    parquet(tmp_path / "data", files, count=12)
    config = settings(tmp_path)
    both = [taken(begun(config, rank, 2), 3) for rank in range(2)]
    assert [len(rows) for rows in both] == [6, 6]
    assert not set(both[0]) & set(both[1]) and sorted(both[0] + both[1]) == [*range(12)]


def test_fewer_rows_than_processes(tmp_path: Path) -> None:
    parquet(tmp_path / "data", count=3)
    batches = begun(settings(tmp_path, "--train.train_batch_size=8"), rank=7, world=8)
    with pytest.raises(InputError, match=r"has no row for process 8 of 8$"):
        taken(batches, 1)


def test_the_first_rows_only(tmp_path: Path) -> None:
    parquet(tmp_path / "data")
    assert set(taken(begun(settings(tmp_path, "--data.max_train_samples=5")), 5)) == {0, 1, 2, 3, 4}


def test_an_image_has_its_pixels_caption_and_noise(tmp_path: Path) -> None:
    parquet(tmp_path / "data")
    config = settings(tmp_path, "--data.center_crop=true")
    for rank in range(2):
        batches = begun(config, rank, 2)
        for step, batch in enumerate(batches.ahead(0, 4)):
            assert batch.indices == range(4 * step + 2 * rank, 4 * step + 2 * rank + 2)
            assert torch.equal(batch.noise, normal(config.train.seed, Purpose.NOISE, batch.indices, (3, 8, 8)))
            assert batches.model.text is not None and batch.ids is not None and batch.images is not None
            rows = shown(batch)
            assert torch.equal(batch.ids, batches.model.text.tokenize([f"row {row}" for row in rows])[0])
            whole = [to_array(Image.new("RGB", (10, 8), (10 * row, 255 - 10 * row, 60)), (8, 8)) for row in rows]
            assert np.array_equal(batch.images.numpy(), np.stack(whole))
            names = batches.names(batch.indices)
            assert [int(re.search(r"'(\d+)\.png'", name)[1]) for name in names] == rows  # type: ignore[index]


# ---- what cannot be used -------------------------------------------------------------------------------------------


def test_bad_rows_are_passed_over_named_and_counted(tmp_path: Path) -> None:
    parquet(tmp_path / "data", bad=(2, 7))
    said: list[str] = []
    config = settings(tmp_path)
    batches = begun(config, said=said)
    rows = taken(batches, 4)
    good = [row for row in range(ROWS) if row not in (2, 7)]
    assert sorted(rows[: len(good)]) == good
    assert batches.bad >= 2 and batches.taken == len(rows) + batches.bad
    told = [line for line in said if line.startswith("passed over: ")]
    assert len(told) == batches.bad and {"2.png", "7.png"} == set(re.findall(r"\d+\.png", " ".join(told)))
    lines = (Path(config.train.output_dir) / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 2 + batches.bad  # of the first look, then of the run
    assert all(json.loads(line)["name"].startswith(str(tmp_path / "data")) for line in lines)


def test_too_many_bad_rows_end_a_run_that_has_been_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "data", bad=(6, 7, 8, 9))
    monkeypatch.setattr(tables, "WINDOW", 6)  # which are all good
    monkeypatch.setattr(stream, "JUDGED", 20)
    config = settings(tmp_path, "--data.max_bad_fraction=0.1", max_train_steps=20)
    with pytest.raises(InputError, match=r"^[^\n]* of \d+ rows of [^\n]* cannot be used, more than[^\n]*$"):
        train(config, progress=False)
    step = final(config).state["step"]
    assert 0 < step < 20 and len(metrics(config)) == step
    monkeypatch.setattr(tables, "WINDOW", 1024)
    with pytest.raises(InputError, match=r"^4 of 13 samples of "):
        begun(settings(tmp_path / "other", f"--data.dataset_name={tmp_path / 'data'}", "--data.max_bad_fraction=0.1"))


def broken(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Every pass over the stream breaks off after so many rows, but for that of the first look."""

    def opening(config: Any) -> Any:
        found = tables.open_stream(config)

        def rows() -> Iterator[Any]:
            yield from found.take(after)
            raise ConnectionError("reset\nby peer")

        return datasets.IterableDataset.from_generator(rows, features=found.features)

    monkeypatch.setattr(stream, "open_stream", opening)


def test_a_stream_that_breaks_off_leaves_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "data")
    config = settings(tmp_path, "--data.shuffle_buffer=1")
    with monkeypatch.context() as patched:
        broken(patched, 10)
        with pytest.raises(
            Stopped, match=r"^[^\n]* broke off after \d+ rows \(reset by peer\); the same command goes on$"
        ):
            train(config, progress=False)
    assert final(config).state["step"] == 2  # 10 rows, of which datasets holds one back, are two steps of 4
    train(config, progress=False)
    assert final(config).state["step"] == 6 and [one["step"] for one in metrics(config)] == [*range(1, 7)]


def test_a_stream_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    config = settings(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"^data\.dataset_name: [^\n]*cannot be read as a data set[^\n]*$"):
        begun(config)
    report = check(config, progress=False)
    assert report.would_fail is not None and "cannot be read as a data set" in report.would_fail


# ---- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_weights_and_takes_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "data")
    seen: dict[int, list[int]] = {}
    step_of = Trainer.step

    def watched(trainer: Trainer, batch: Batch) -> dict[str, float]:
        seen[batch.indices.start // 4] = shown(batch)
        return step_of(trainer, batch)

    monkeypatch.setattr(Trainer, "step", watched)
    config = settings(tmp_path, "--optimizer.lr_scheduler=constant", "--optimizer.lr_warmup_steps=0")
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, max_train_steps=3)), progress=False)
    before = final(config)
    order = [row for step in range(3) for row in seen[step]]
    other = dataclasses.replace(config.data, dataset_name=str((tmp_path / "data").rename(tmp_path / "moved")))
    config = dataclasses.replace(config, data=other)
    accelerator, lines = make_accelerator(config), []
    trainer = Trainer(config, accelerator, before, say=lines.append)
    tensors, _ = trainer._state()
    assert tensors.keys() == before.tensors.keys()
    for name, part in before.tensors.items():
        assert all(torch.equal(tensors[name][key], tensor) for key, tensor in part.items())
    assert trainer.steps_done == 3 and sum("in another order" in line for line in lines) == 1
    trainer.run()
    assert final(config).state["step"] == 6
    resumed = [row for step in range(3, 6) for row in seen[step]]
    assert len(set(resumed)) == 12 and len(set(order)) == 12  # rows come again, as an epoch has but 13
    assert resumed != order and Counter(resumed) & Counter(order)
    assert not torch.equal(
        final(config).tensors["model"]["unet.conv_in.weight"], before.tensors["model"]["unet.conv_in.weight"]
    )


def test_three_steps_and_an_export(tmp_path: Path) -> None:
    parquet(tmp_path / "data")
    config = settings(tmp_path, max_train_steps=3)
    run = train(config, progress=False)
    export(run, tmp_path / "model")
    model = DiffusionModel.load(tmp_path / "model")
    x = torch.zeros(1, 3, 8, 8)
    assert model.text is not None
    context = model.text(model.text.tokenize(["row 3"])[0]).context
    assert model.unet(x, torch.tensor([5]), context).isfinite().all()
    assert final(config).state["data"] == tables.STREAMED


# ---- what is said and refused --------------------------------------------------------------------------------------


def test_check_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "WINDOW", 5)
    parquet(tmp_path / "data", bad=(1, 9))
    report = check(settings(tmp_path), progress=False)
    assert report.would_fail is None
    (note,) = [note for note in report.notes if note.startswith("data.streaming: pure: ")]
    assert "in another order" in note and "\n" not in note and f"note: {note}" in report.as_text()
    tree = json.loads(report.as_json())
    assert note in tree["notes"] and tree["figures"]["stream"] == {"looked_at": 5, "exact_resume": False}
    assert "4 of the first 5 can be used" in report.as_text() and "buckets" not in tree["figures"]
    assert [fault["name"] for fault in tree["faults"]] == [f"{tmp_path / 'data'}, row 2"]
    said: list[str] = []
    begun(settings(tmp_path), said=said)
    assert sum(line.startswith("data.streaming: pure: ") for line in said) == 1


@pytest.mark.parametrize(
    "override",
    [
        "data.aspect_buckets=true",
        "data.held_out=2",
        "data.look=quick",
        "data.cache_latents=true",
        "data.cache_text=true",
        "data.label_column=kind",
    ],
)
def test_what_needs_all_images_is_refused(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(InputError, match=rf"^{re.escape(key)}: needs to know all images[^\n]*data\.streaming[^\n]*$"):
        settings(tmp_path, f"--{override}")


def test_prior_preservation_and_stray_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.class_data_dir: needs to know all images"):
        settings(tmp_path, "--data.class_data_dir=x", "--data.class_prompt=a thing")
    with pytest.raises(InputError, match=r"^data\.shuffle_buffer: only with data\.streaming pure$"):
        settings(tmp_path, "--data.streaming=index", "--data.shuffle_buffer=7")
    with pytest.raises(InputError, match=r"^data\.streaming: only with data\.dataset_name$"):
        tiny_config(tmp_path, "data", "--data.streaming=pure")
