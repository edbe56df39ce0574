"""Short versions of benchmarks/reliability/, the same functions with a few trials each; and whether those can fail."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks/reliability"))

import common
import disk_full
import kill_anywhere
import kill_at_syscalls
import order
import other_process_counts
import second_trainer
import stop_anywhere
import table
import tracing
import wrong_resumes
from common import Tiny, Trials
from forks import Forks
from kill_anywhere import Start, Whole
from short_run import ShortRun

STEPS = 6
why = tracing.refused()
traced = pytest.mark.skipif(why is not None, reason=str(why))


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reliability")


@pytest.fixture(scope="module")
def tiny(work: Path) -> Tiny:
    made = common.make_tiny(work / "tiny", steps=STEPS, checkpointing_steps=2)
    file = made.folder / "config.yaml"
    file.write_text(file.read_text().replace("validation_steps: 20", "validation_steps: 6"))
    return made


@pytest.fixture(scope="module")
def start(tiny: Tiny, forks: Forks) -> dict[str, Start]:
    return {"fork": kill_anywhere.starters(tiny, forks)["fork"]}


@pytest.fixture(scope="module")
def whole(work: Path, start: dict[str, Start]) -> Whole:
    return kill_anywhere.unbroken(work, start)


@pytest.fixture(scope="module")
def short(work: Path, forks: Forks) -> ShortRun:
    return ShortRun(work, forks)


@pytest.fixture(scope="module")
def base(work: Path, whole: Whole) -> Path:
    """A run of two checkpoints."""
    return work / "unbroken-fork"


def passed(trials: Trials, least: int) -> None:
    wrong = [line for line in trials.lines if not line["ok"]]
    assert not wrong and trials.trials >= least, json.dumps(wrong, indent=1)


def test_killed_anywhere(work: Path, start: dict[str, Start], whole: Whole) -> None:
    trials = Trials("kill_anywhere")
    facts = kill_anywhere.prove(trials, work, start, whole, n=3, seed=0)
    passed(trials, 3)
    assert facts["kills"] >= 3


def test_stopped_anywhere(work: Path, start: dict[str, Start], whole: Whole) -> None:
    trials = Trials("stop_anywhere")
    stop_anywhere.prove(trials, work, start, whole, n=3, seed=0)
    passed(trials, 3)


def test_a_second_trainer(work: Path, tiny: Tiny, forks: Forks, whole: Whole) -> None:
    trials = Trials("second_trainer")
    second_trainer.prove(trials, work, tiny, forks, whole, n=1, seed=0)
    passed(trials, 1)


def test_other_micro_batches_after_stops(work: Path, tiny: Tiny, forks: Forks) -> None:
    """Other numbers of processes: tests/test_processes.py."""
    trials = Trials("other_process_counts")
    other_process_counts.prove(trials, work, tiny, forks, n=1, seed=0, processes=(1, 1))
    passed(trials, 1)


def test_wrong_resumes(work: Path, forks: Forks) -> None:
    trials, place = Trials("wrong_resumes"), work / "wrong"
    place.mkdir()
    wrong_resumes.prove(trials, place, forks, n=2)
    passed(trials, 5)


@traced
@pytest.mark.parametrize("kind", list(kill_at_syscalls.SAVES))
def test_killed_at_system_calls_of_a_save(work: Path, base: Path, forks: Forks, kind: str) -> None:
    trials = Trials("kill_at_syscalls")
    assert kill_at_syscalls.go_through(trials, kind, base, work, forks, 3) > 100
    passed(trials, 3)


@traced
def test_killed_at_system_calls_of_a_run(short: ShortRun) -> None:
    trials = Trials("kill_at_syscalls")
    assert kill_at_syscalls.go_through_run(trials, short, 2) > 100
    passed(trials, 2)


@traced
def test_disk_full(short: ShortRun) -> None:
    trials = Trials("disk_full")
    disk_full.injected(trials, short, 2)
    disk_full.export(trials, short, 2)
    passed(trials, 4)


@traced
def test_order_of_a_save_and_that_every_sync_counts(work: Path, base: Path, forks: Forks) -> None:
    trials = Trials("order")
    for kind, calls in order.prove(trials, work, base, forks).items():
        run, step = work / f"order-{kind}/run", STEPS + kill_at_syscalls.SAVES[kind]
        syncs = [place for place, call in enumerate(calls) if call.name == "fsync"]
        assert len(syncs) == 8  # of five files, twice their folder, and the run folder
        for place in syncs:
            without = order.breaches(calls[:place] + calls[place + 1 :], run, step)
            assert any(without.values()), calls[place]
    passed(trials, 2 * len(order.RULES))


# ---- whether differences are seen


def a_weight(run: Path) -> None:
    common.edit_tensors(run / f"checkpoint-{STEPS}/model.safetensors", lambda found: found["unet.conv_in.bias"].add_(1))


def a_metric(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], *lines[2:]]) + "\n")


def a_file(run: Path) -> None:
    (run / ".tmp123456").touch()


def a_manifest(run: Path) -> None:
    (run / f"checkpoint-{STEPS}/manifest.json").write_text('{"files": {}}')


def a_picture(run: Path) -> None:
    next((run / "previews").iterdir()).unlink()


@pytest.mark.parametrize("change", [a_weight, a_metric, a_file, a_manifest, a_picture])
def test_a_run_with_anything_else_in_it_is_seen(work: Path, whole: Whole, tmp_path: Path, change: Any) -> None:
    run = shutil.copytree(work / "unbroken-fork", tmp_path / "run")
    assert not common.differences(whole[0], run)
    change(run)
    assert common.differences(whole[0], run)


def test_other_draws_are_seen(tmp_path: Path) -> None:
    expected = {"0": ["a", "b", "c", "d"], "1": ["e", "f", "g", "h"]}
    for lines, told in (
        ([expected], []),
        ([expected, {"1": expected["1"]}], ["image 1 of the run was trained on twice"]),
        ([{"0": expected["0"]}], ["image 1 of the run: missing"]),
        ([{**expected, "1": ["e", "f", "G", "h"]}], ["image 1 of the run: other noise"]),
    ):
        (tmp_path / "draws-0-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert other_process_counts.compare(expected, tmp_path) == told


# ---- the table


def test_the_table_counts_trials_and_failures() -> None:
    lines = [
        {"test": "kill_anywhere", "trial": 0, "ok": False},
        {"test": "kill_anywhere", "summary": True, "n": 200, "failures": 1},
        {"test": "peer_kill_between_steps", "summary": True, "n": 5, "failures": 4},
        {"test": "disk_full", "summary": True, "n": 0, "failures": 0, "skipped": "no strace"},
    ]
    rows = table.table(lines).splitlines()
    assert rows[2] == "| kill -9 at any instant, then the same command | 200 | 1 | fails 4 of 5 |"
    assert "| no space left, or a write error, at every call | not made |  |  |" in rows


def test_the_page_has_the_figures_that_were_measured() -> None:
    page, lines = table.PAGE.read_text(), table.read(table.RESULTS)
    assert table.BEGIN in page and table.END in page
    if lines:
        assert table.written(page, lines) == page
