"""A run that is told to stop, at any moment, stops soon, is saved, and goes on as if it had not been."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_run import assert_same, final, image_folder, metrics, tiny_config

from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import Stopped
from diffusion_unet.model import DiffusionModel
from training import checkpoint, data, engine, evaluate
from training.engine import StopSignal, told_to_stop
from training.loop import Trainer, train

SECOND = 1.0


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def draw(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    """Two passes of the network, and pictures of nothing."""
    assert model.text is not None
    for _ in range(2):
        with torch.no_grad():
            Denoiser(model.unet, model.schedule)(torch.zeros(1, 3, 8, 8), 1.0, model.text.encode(prompts[:1]))
    return [Image.new("RGB", (8, 8))] * (len(prompts) * len(seeds))


def at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """A signal in the midst of call number `call` of `owner.name`."""
    plain: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def signalled(*args: Any, **given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            tell()
        return plain(*args, **given)

    monkeypatch.setattr(owner, name, signalled)


EXTRA = ("--validation.validation_prompts=[red]", "--validation.validation_steps=2", "--data.held_out=4")


@pytest.mark.parametrize(
    "owner, name, call, step",
    [
        (data, "_look", 3, None),  # the look at the images
        (checkpoint, "sweep", 1, None),  # before anything is looked at
        (Trainer, "step", 3, 3),
        (Trainer, "save", 1, 3),  # that of step 2: noticed after the step behind it
        ("preview", "", 2, 4),
        (evaluate, "encode", 1, 2),  # the held-out loss
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_told_to_stop_at_any_moment(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, step: int | None
) -> None:
    settings: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2}
    unbroken = tiny_config(tmp_path / "a", images, *EXTRA, **settings)
    train(unbroken, preview=draw, progress=False)
    broken = tiny_config(tmp_path / "b", images, *EXTRA, **settings)
    previews = 0

    def preview(*args: Any) -> list[Image.Image]:
        nonlocal previews
        previews += 1
        if owner == "preview" and previews == call:
            tell()
        return draw(*args)

    if owner != "preview":
        at(monkeypatch, owner, name, call)
    with pytest.raises(Stopped, match="the same command goes on") as caught:
        train(broken, preview=preview, progress=False)
    assert caught.value.exit_code == 75 and "\n" not in str(caught.value)
    monkeypatch.undo()
    assert not told_to_stop() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    saved = sorted((tmp_path / "b/run").glob("checkpoint-*"))
    assert [folder.name for folder in saved][-1:] == ([] if step is None else [f"checkpoint-{step}"])
    train(broken, preview=draw, progress=False)
    assert_same(final(unbroken), final(broken))
    timeless = [[record | {"seconds": 0} for record in metrics(config)] for config in (unbroken, broken)]
    assert timeless[0] == timeless[1]
    grids = [sorted(file.name for file in (tmp_path / run / "run/previews").iterdir()) for run in "ab"]
    assert grids[0] == grids[1] == ["step_000002.png", "step_000004.png"]


def test_a_stop_ends_a_long_look_without_looking_at_the_rest(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0
    plain = data._look

    def slow(*args: Any) -> Any:
        nonlocal looked
        looked += 1
        if looked == 2:
            tell()
        time.sleep(0.02)
        return plain(*args)

    monkeypatch.setattr(data, "_look", slow)
    many = image_folder(tmp_path / "many", 200)
    with pytest.raises(Stopped):
        train(tiny_config(tmp_path, many), progress=False)
    assert looked < 50


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    yield now


def test_a_second_signal_does_what_it_always_did(clock: list[float]) -> None:
    with StopSignal(Path("run")) as stop:
        tell(signal.SIGINT)
        assert stop.stopped
        clock[0] += SECOND / 2
        tell(signal.SIGINT)  # by the launcher, of the same key
        clock[0] += SECOND
        with pytest.raises(KeyboardInterrupt):
            tell(signal.SIGINT)
            signal.sigtimedwait([], 0.2)


def test_the_command_saves_and_ends_with_its_code(tmp_path: Path, images: Path) -> None:
    settings = [f"--train.output_dir={tmp_path / 'run'}", f"--data.train_data_dir={images}", "--data.resolution=8"]
    settings += ["--train.max_train_steps=100000", "--model.unet.block_out_channels=[8, 8, 8]"]
    settings += ["--validation.validation_prompts=[]"]
    command = [sys.executable, "-m", "diffusion_unet", "train", "quickstart", *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        log = tmp_path / "run/metrics.jsonl"
        try:
            until = time.monotonic() + 120
            while not (log.exists() and len(log.read_text().splitlines()) > 2):
                assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75 and time.monotonic() - told < 10
    last = error.strip().splitlines()[-1]
    assert "stopped at step" in last and "the same command goes on" in last and "Traceback" not in error
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
