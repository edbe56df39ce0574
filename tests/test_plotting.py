"""The picture of a run: the numbers of its lines are those of metrics.jsonl, however many or few."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_unet.errors import InputError
from training import plotting

pytest.importorskip("matplotlib")

SIGMAS = ["0.05", "0.7", "12"]


def write(run: Path, steps: int, *, every: int = 20, looks: int | None = None, loss: float = 1.0) -> list[float]:
    """Steps of two seconds, and the losses written."""
    run.mkdir(parents=True, exist_ok=True)
    losses = (loss * (1 + np.random.default_rng(0).random(steps))).tolist()
    lines: list[dict[str, Any]] = []
    for step, value in enumerate(losses, 1):
        record = {"step": step, "loss": value, "lr": 1e-3 / step, "grad_norm": 1.0, "seconds": 2.0 * step}
        if step % every == 0:
            record["levels"] = {sigma: float(sigma) * step for sigma in SIGMAS}
        lines.append(record)
        if looks and step % looks == 0:
            held_out = {name: {sigma: scale * step for sigma in SIGMAS} for name, scale in (("raw", 2), ("0.99", 1))}
            lines.append({"step": step, "held_out_loss": held_out, "training_loss": {"raw": held_out["0.99"]}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return losses


def panels(run: Path) -> dict[str, Any]:
    """The axes, by the beginning of their titles."""
    return {axes.get_title(loc="left").split(",")[0]: axes for axes in plotting.draw(run).axes}


def line(axes: Any, number: int = 0) -> tuple[list[float], list[float]]:
    x, y = axes.get_lines()[number].get_data()
    return list(x), list(y)


def test_a_run_of_three_steps_shows_each(tmp_path: Path) -> None:
    losses = write(tmp_path, 3)
    found = panels(tmp_path)
    assert list(found) == ["Training loss", "Training loss at each noise level", "Learning rate", "Steps a second"]
    assert line(found["Training loss"]) == ([1, 2, 3], losses)
    assert line(found["Learning rate"]) == ([1, 2, 3], [1e-3, 5e-4, 1e-3 / 3])
    assert line(found["Steps a second"]) == ([1.5, 2.5], [0.5, 0.5])
    assert found["Training loss"].get_yscale() == "log"
    assert [text.get_text() for text in found["Training loss at each noise level"].texts] == ["not written yet"]
    path = plotting.plot(tmp_path)
    assert path == tmp_path / "plot.png"
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_one_step_is_enough(tmp_path: Path) -> None:
    write(tmp_path, 1, every=1, looks=1)
    found = panels(tmp_path)
    assert line(found["Training loss at each noise level"], 2) == ([1], [12.0])
    assert [text.get_text() for text in found["Steps a second"].texts] == ["two steps are needed"]


def test_images_a_second_by_the_newest_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "state.json").write_text('{"step": 2, "images_seen": 128}')
    assert line(panels(tmp_path)["Images a second"]) == ([1.5, 2.5, 3.5], [32.0, 32.0, 32.0])


def test_levels_and_looks_are_those_of_the_records(tmp_path: Path) -> None:
    write(tmp_path, 60, looks=30)
    found = panels(tmp_path)
    levels = found["Training loss at each noise level"]
    assert [line(levels, place) for place in range(3)] == [
        ([20, 40, 60], [float(sigma) * step for step in (20, 40, 60)]) for sigma in SIGMAS
    ]
    assert [text.get_text() for text in levels.get_legend().get_texts()] == SIGMAS[::-1]
    colours = [plot.get_color() for plot in levels.get_lines()]
    brightness = [sum(colour[:3]) for colour in colours]
    assert brightness == sorted(brightness) and len(set(brightness)) == 3
    means = found["Loss on held-out and on training images"]
    assert [line(means, place) for place in range(3)] == [
        ([30, 60], [60.0, 120.0]),  # raw, held-out
        ([30, 60], [30.0, 60.0]),  # raw, training
        ([30, 60], [30.0, 60.0]),  # averaged, held-out
    ]
    last = found["The same at each noise level"]
    assert line(last) == ([0.05, 0.7, 12.0], [120.0] * 3) and last.get_xscale() == "log"
    texts = [text.get_text() for text in last.get_legend().get_texts()]
    assert texts == ["raw weights", "average 0.99", "held-out", "training images"]


def test_a_long_run_is_thinned_out_and_keeps_its_extremes(tmp_path: Path) -> None:
    losses = write(tmp_path, 20_000, looks=5000)
    losses_with_peak = [*losses]
    losses_with_peak[12_345] = 99.0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [line.replace(repr(losses[12_345]), "99.0") for line in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    axes = panels(tmp_path)["Training loss"]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 99.0 and band[:, 1].min() == min(losses) and len(band) < 5 * plotting.POINTS
    x, y = line(axes)
    assert len(x) == plotting.POINTS + 1 and (x[0], x[-1]) == (1, 20_000)
    middle = len(x) // 2
    around = losses_with_peak[int(x[middle]) - 1 - 199 : int(x[middle]) - 1 + 201]  # a window of 400 steps
    assert y[middle] == pytest.approx(np.mean(around), rel=1e-9)


def test_losses_below_zero_have_a_plain_axis_and_null_is_a_gap(tmp_path: Path) -> None:
    write(tmp_path, 5, loss=-1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": null, "lr": 0.1, "seconds": 12.0}\n{"step": 7, "lo')
    axes = panels(tmp_path)["Training loss"]
    assert axes.get_yscale() == "linear"
    x, y = line(axes)
    assert x == [1, 2, 3, 4, 5, 6] and np.isnan(y[-1]) and np.isfinite(y[:-1]).all()


def test_smoothing_is_a_mean_around_each_step() -> None:
    values = np.random.default_rng(1).random(101)
    for window in (1, 2, 5, 20):
        inner = np.convolve(values, np.full(window, 1 / window), "valid")
        smooth = plotting._smooth(values, window)
        assert smooth[(window - 1) // 2 : 101 - window // 2] == pytest.approx(inner, rel=1e-9)
        assert smooth[-1] == pytest.approx(values[100 - (window - 1) // 2 :].mean(), rel=1e-9)
    assert plotting._smooth(np.array([1.0, np.nan, 3.0]), 3).tolist() == [1.0, 2.0, 3.0]


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is this the folder of a run"):
        plotting.plot(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no step is written there yet"):
        plotting.plot(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 1, "held_out_loss": {"0.05": 1}}\n')
    with pytest.raises(InputError, match="step 1: held_out_loss is not"):
        plotting.plot(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'diffusion-unet\[plot\]'"):
        plotting.plot(tmp_path)
