"""Checkpoints of a run: whole or absent, verified, and what was there before is never lost."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_unet.errors import InputError, SaveError, in_bytes
from training import checkpoint

Usage = namedtuple("Usage", "total used free")


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    layered = torch.full((2, 3, 4, 4), value).contiguous(memory_format=torch.channels_last)
    return {"model": {"w": layered, "b": torch.full((3,), value)}, "optimizer": {"exp_avg.w": layered + 1}}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, {"images_seen": 28}, tensors(0.5), keep=2)
    assert path == tmp_path / "checkpoint-7"
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    found = checkpoint.load(tmp_path)
    assert found and found.path == path and found.state == {"format": 2, "step": 7, "images_seen": 28}
    for name, part in tensors(0.5).items():
        assert part.keys() == found.tensors[name].keys()
        assert all(torch.equal(tensor, found.tensors[name][key]) for key, tensor in part.items())
    assert torch.equal(load_file(path / "model.safetensors")["b"], torch.full((3,), 0.5))
    assert found.averages == [] and checkpoint.load(tmp_path / "none") is None


def test_averages_by_name(tmp_path: Path) -> None:
    checkpoint.save(
        tmp_path, 1, {}, {name: {"w": torch.ones(1)} for name in ("model", "ema_0.99", "ema_0.999")}, keep=None
    )
    found = checkpoint.load(tmp_path)
    assert found and sorted(found.averages) == ["0.99", "0.999"]


@pytest.mark.parametrize(("keep", "left"), [(2, [9, 100]), (3, [2, 9, 100]), (1, [9, 100]), (None, [1, 2, 9, 100])])
def test_retention_keeps_the_newest_and_at_least_two(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in (1, 2, 9, 100):
        checkpoint.save(tmp_path, step, {}, tensors(step), keep)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in left)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped byte": ("model.safetensors", flip_a_byte),
    "a cut file": ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-7])),
    "a missing file": ("optimizer.safetensors", Path.unlink),
    "a changed state": ("state.json", flip_a_byte),
    "no manifest": ("manifest.json", Path.unlink),
    "an empty manifest": ("manifest.json", lambda path: path.write_text("{}")),
    "a manifest cut short": ("manifest.json", lambda path: path.write_text(path.read_text()[:-9])),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, kind: str) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {}, tensors(step), keep=2)
    file, damage = DAMAGE[kind]
    damage(tmp_path / "checkpoint-2" / file)
    told: list[str] = []
    found = checkpoint.load(tmp_path, told.append)
    assert found and found.state["step"] == 1
    assert len(told) == 1 and str(tmp_path / "checkpoint-2" / file) in told[0] and "\n" not in told[0]


def test_nothing_whole_is_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {}, tensors(1), keep=2)
    flip_a_byte(tmp_path / "checkpoint-1" / "model.safetensors")
    with pytest.raises(InputError, match="none of its 1 checkpoints is whole"):
        checkpoint.load(tmp_path, lambda message: None)


def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {}, tensors(1), keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret.safetensors"] = {"bytes": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="missing"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1024 bytes (1.0 KiB)"),
        (4_123_456_789, "4123456789 bytes (3.8 GiB)"),
        (2**51, "2251799813685248 bytes (2048.0 TiB)"),
    ],
)
def test_sizes_are_told_exactly_and_in_a_unit(count: int, text: str) -> None:
    assert in_bytes(count) == text


def test_space_is_looked_up_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {}, tensors(1), keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 1000))
    told = r"checkpoint-2: \d+ bytes \(1\.0 MiB\) are needed and 1000 bytes are free: "
    with pytest.raises(SaveError, match=told) as caught:
        checkpoint.save(tmp_path, 2, {}, tensors(2), keep=2)
    assert caught.value.exit_code == 4
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("call", range(7))
def test_no_space_at_any_write_leaves_the_old_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Every write and every rename is followed by `os.fsync`; each in turn finds the disk full."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {}, tensors(step), keep=2)
    calls = iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SaveError, match=r"No space left on device\); \d+ bytes( \(1\.0 MiB\))? are needed$"):
        checkpoint.save(tmp_path, 3, {}, tensors(3), keep=2)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    found = checkpoint.load(tmp_path)
    assert found and found.state["step"] == 2
    checkpoint.save(tmp_path, 3, {}, tensors(3), keep=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_an_old_one_that_cannot_be_removed_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {}, tensors(step), keep=2)
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if old.name == "checkpoint-1":
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(SaveError, match=r"checkpoint-1: could not be removed \(Input/output error\); .*-3 is whole"):
        checkpoint.save(tmp_path, 3, {}, tensors(3), keep=2)
    found = checkpoint.load(tmp_path)
    assert found and found.state["step"] == 3


def test_what_a_killed_save_left_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {}, tensors(1), keep=2)
    shutil.copytree(path, tmp_path / f"{checkpoint.HIDDEN}checkpoint-2")
    shutil.copytree(path, tmp_path / f"{checkpoint.HIDDEN}old-checkpoint-0")
    found = checkpoint.load(tmp_path)
    assert found and found.path == path
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_older_ones_that_a_killed_save_did_not_remove_are_swept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {}, tensors(step), keep=None)
    checkpoint.sweep(tmp_path)
    assert len(names(tmp_path)) == 3
    checkpoint.sweep(tmp_path, keep=1)  # two at least
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_files_that_a_killed_process_was_writing_are_swept(tmp_path: Path) -> None:
    run, killed = tmp_path / "run", "import os, pathlib, sys; from diffusion_unet import checkpoint; "
    killed += "os.fsync = lambda *given: os._exit(9); path = pathlib.Path(sys.argv[1]); "
    for name, call in (("previews/a.png", "write_bytes(path, b'.')"), ("cache/b/0", "write_safetensors(path, {})")):
        code = f"{killed}checkpoint.{call}"
        assert subprocess.run([sys.executable, "-c", code, run / name]).returncode == 9
    (run / "cache/b/.tmpAb12Cd").write_bytes(b"half of what safetensors writes")
    kept = run / "previews/.tmp-of-mine.png"
    kept.write_bytes(b".")
    assert len([*run.rglob(".*")]) == 4
    checkpoint.sweep(run)
    assert [*run.rglob(".*")] == [kept]


def test_what_cannot_be_swept_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises(SaveError, match=r"what a killed process left there cannot be removed .*Input/output error"):
        checkpoint.sweep(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, 5, {}, tensors(value), keep=2)
    found = checkpoint.load(tmp_path)
    assert found and found.tensors["model"]["b"].tolist() == [2.0] * 3
    assert names(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_step_is_saved_again_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    checkpoint.save(tmp_path, 5, {}, tensors(1), keep=2)
    rename, calls = os.rename, iter(range(100))

    def killed(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path and next(calls) == renames:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr("os.rename", killed)
        checkpoint.save(tmp_path, 5, {}, tensors(2), keep=2)
    checkpoint.sweep(tmp_path)
    found = checkpoint.load(tmp_path)
    assert found and found.tensors["model"]["b"].tolist() == [2.0 if renames == 2 else 1.0] * 3
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_step_that_cannot_be_saved_again_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 5, {}, tensors(1), keep=2)
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if source.name.startswith(checkpoint.HIDDEN):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("os.rename", full)
    with pytest.raises(SaveError):
        checkpoint.save(tmp_path, 5, {}, tensors(2), keep=2)
    found = checkpoint.load(tmp_path)
    assert found and found.tensors["model"]["b"].tolist() == [1.0] * 3 and names(tmp_path) == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "w is missing"),
        ({"w": torch.zeros(2), "v": torch.zeros(2)}, "v is not part of this run"),
        ({"w": torch.zeros(3)}, r"w is \[\[3\], 'torch.float32'\] in the checkpoint and \[\[2\]"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, "float64"),
    ],
)
def test_check_tensors(given: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=f"file: {message}" if "float64" not in message else message):
        checkpoint.check_tensors({"w": torch.zeros(2)}, given, "file")
