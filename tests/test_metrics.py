"""What a run writes down: metrics.jsonl, the loss at each noise level, and accelerate's trackers."""

import errno
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_unet.errors import InputError, SaveError
from training.metrics import LevelLosses, Metrics, flatten, load, open_trackers, tracker_settings

# --- metrics.jsonl


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, main=True)
    records = [{"step": 1, "loss": 0.1 + 0.2, "levels": {"0.05": 1e-9}}, {"step": 2, "held_out_loss": {"raw": {}}}]
    for record in records:
        metrics.write(record)
    assert load(metrics.path) == records


def test_only_the_main_process_writes_and_trims(tmp_path: Path) -> None:
    other = Metrics(tmp_path, main=False)
    other.write({"step": 1, "loss": 1.0})
    assert not other.path.exists()
    Metrics(tmp_path, main=True).write({"step": 9, "loss": 1.0})
    other.trim(1)
    assert [record["step"] for record in load(other.path)] == [9]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, main=True)
    metrics.write({"step": 1, "loss": float("nan"), "levels": {"1": float("-inf"), "2": 3.0}})
    line = metrics.path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "levels": {"1": None, "2": 3.0}}


def test_trimming_takes_out_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, main=True)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": 1.0})
    metrics.write({"step": 2, "held_out_loss": {"raw": {"1": 1.0}}})
    with open(metrics.path, "a") as file:
        file.write('{"step": 2, "lo')
    metrics.trim(2)
    assert [record["step"] for record in load(metrics.path)] == [1, 2, 2]
    assert len(metrics.path.read_bytes().splitlines()) == 3


def test_a_held_out_loss_that_is_measured_again_is_taken_out(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, main=True)
    for record in ({"step": 1, "loss": 1.0}, {"step": 1, "held_out_loss": {}}, {"step": 2, "loss": 1.0}):
        metrics.write(record)
    metrics.write({"step": 2, "held_out_loss": {}})
    metrics.trim(2, looked=False)
    assert ["loss" in record for record in load(metrics.path)] == [True, False, True]


@pytest.mark.parametrize("taken", [None, 5], ids=["refused", "a part taken"])
def test_a_line_that_the_disk_refused_once_is_not_written_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int | None
) -> None:
    class FullOnce(io.FileIO):
        """On a disk that is full at the first call, by an error or by taking less, and has room again after it."""

        calls = 0

        def write(self, data: Any) -> int:
            self.calls += 1
            if self.calls == 1 and taken is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:taken] if self.calls == 1 else data)

    metrics = Metrics(tmp_path, main=True)
    monkeypatch.setattr("builtins.open", lambda path, mode, buffering: FullOnce(path, mode.replace("b", "")))
    with pytest.raises(SaveError, match="No space left"):
        metrics.write({"step": 1, "loss": 1.0})
    assert metrics.path.read_bytes() == b'{"ste'[:taken] * (taken is not None)
    monkeypatch.undo()
    metrics.trim(0)
    assert metrics.path.read_bytes() == b""


def test_a_line_without_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, main=True)
    metrics.path.write_text('{"step": 1, "loss": 1.0}')
    metrics.trim(1)
    metrics.write({"step": 2, "loss": 2.0})
    assert [record["step"] for record in load(metrics.path)] == [1, 2]


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"3", b'{"loss": 1}', b'{"step": null}', b"[" * 100000, b"\xff"])
def test_what_is_no_record_is_passed_over(line: bytes, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, main=True)
    metrics.path.write_bytes(line + b'\n{"step": 7}\n')
    assert load(metrics.path) == [{"step": 7}]
    metrics.trim(7)
    assert metrics.path.read_bytes() == b'{"step": 7}\n'


def test_what_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(SaveError, match=r"metrics\.jsonl: cannot be written"):
        Metrics(tmp_path, main=True).write({"step": 1})
    with pytest.raises(InputError, match=r"nowhere.*is this the folder of a run"):
        load(tmp_path / "nowhere" / "metrics.jsonl")


# --- the loss at each noise level

MIDDLES, EDGES = [0.1, 1.0, 10.0], [0.3, 3.0]


def draws(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.randn(count, generator=generator, dtype=torch.float64).mul(2).exp()
    return sigma, torch.rand(count, generator=generator)


def means(sigma: Tensor, losses: Tensor) -> dict[str, float]:
    """By numpy's own binning."""
    places, values = np.digitize(sigma.numpy(), EDGES, right=True), losses.double().numpy()
    return {name: values[places == place].mean() for place, name in enumerate(("0.1", "1", "10"))}


def test_mean_loss_of_each_range() -> None:
    levels, (sigma, losses) = LevelLosses(MIDDLES, EDGES), draws(300)
    for part in torch.arange(300).split(7):
        levels.add(sigma[part], losses[part])
    assert levels.take() == pytest.approx(means(sigma, losses), rel=1e-12)
    levels.add(sigma[:9], losses[:9] + 1)
    assert levels.take() == pytest.approx(means(sigma[:9], losses[:9] + 1), rel=1e-12), "what was taken is forgotten"


def test_a_range_without_images_is_left_out() -> None:
    levels = LevelLosses(MIDDLES, EDGES)
    assert levels.take() == {}
    levels.add(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]))
    assert levels.take() == {"1": 3.0}


def test_edges_are_one_fewer_than_ranges() -> None:
    with pytest.raises(ValueError, match="2 edges"):
        LevelLosses(MIDDLES, [1.0])


class Together:
    """Two threads in the place of two processes, and their sum."""

    def __init__(self) -> None:
        self.barrier, self.parts = threading.Barrier(2, timeout=20), {0: torch.empty(0), 1: torch.empty(0)}

    def reduce(self, rank: int, tensor: Tensor) -> Tensor:
        self.parts[rank] = tensor
        self.barrier.wait()
        total = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return total


def run_two(interrupted: bool) -> list[dict[str, float]]:
    together, results = Together(), [{}, {}]  # type: ignore[var-annotated]
    sigma, losses = draws(200)

    def process(rank: int) -> None:
        def new() -> LevelLosses:
            return LevelLosses(MIDDLES, EDGES, lambda tensor: together.reduce(rank, tensor), main=rank == 0)

        levels = new()
        for step, part in enumerate(torch.arange(200).split(20)):
            own = part[rank * 10 : rank * 10 + 10]
            levels.add(sigma[own], losses[own])
            if step == 5:
                state = json.loads(json.dumps(levels.state()))
                if interrupted:
                    levels = new()
                    levels.restore(state)
        results[rank] = levels.take()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_processes_give_the_mean_of_all_images_also_when_resumed() -> None:
    straight, resumed = run_two(interrupted=False), run_two(interrupted=True)
    assert straight[0] == straight[1] == pytest.approx(means(*draws(200)), rel=1e-12)
    assert resumed == straight, "to the last bit"


def test_a_state_of_other_ranges_is_refused() -> None:
    with pytest.raises(InputError, match="2 noise levels in the checkpoint, of 3 here"):
        LevelLosses(MIDDLES, EDGES).restore({"sums": [0.0, 0.0], "counts": [0.0, 0.0]})


# --- trackers


def test_nested_records_become_paths() -> None:
    nested = {"loss": 1.0, "held_out_loss": {"raw": {"0.05": 2.0}, "0.99": {"0.05": None}}}
    assert flatten(nested) == {"loss": 1.0, "held_out_loss/raw/0.05": 2.0}


def test_trackers_that_cannot_be_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracker_settings((), tmp_path) == {}
    with pytest.raises(InputError, match=r"^train\.report_to: tensorbord is no tracker"):
        tracker_settings(["tensorbord"], tmp_path)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(InputError, match=r"^train\.report_to: comet_ml is not installed: pip install comet-ml"):
        tracker_settings(["comet_ml"], tmp_path)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tensorboard")
def test_tensorboard_holds_what_was_written_and_not_what_was_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    run.mkdir()
    config = {"train": {"seed": 1, "ema": ["0.9999"], "limit": None}}
    for done, scale in ((0, 1.0), (2, 10.0)):  # the second goes on from the checkpoint of step 2
        accelerator = Accelerator(**tracker_settings(["tensorboard"], run))
        metrics = Metrics(run, main=True, trackers=open_trackers(accelerator, run, config, done))
        metrics.trim(done)
        for step in range(done + 1, 5):
            metrics.write({"step": step, "loss": scale * step, "held_out_loss": {"raw": {"0.05": scale + step}}})
        metrics.close()
    assert scalars(run / "logs" / "run", "loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert scalars(run / "logs" / "run", "held_out_loss/raw/0.05") == [(1, 2.0), (2, 3.0), (3, 13.0), (4, 14.0)]
    saved = next((run / "logs" / "run").glob("*/hparams.yml")).read_text()
    assert "train/seed: 1" in saved and "train/ema: '[''0.9999'']'" in saved
    assert [record["loss"] for record in load(run / "metrics.jsonl")] == [1.0, 2.0, 30.0, 40.0]


def test_without_trackers_nothing_is_opened(tmp_path: Path) -> None:
    assert open_trackers(Accelerator(), tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []
