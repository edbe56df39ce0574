"""A picture of a run: its losses, rate and speed, from what it wrote down."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffusion_unet.checkpoint import write_bytes
from diffusion_unet.errors import InputError
from diffusion_unet.untrusted import read_json

from .metrics import METRICS, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

PICTURE = "plot.png"
POINTS = 600  # of a line, at most: about the pixels of its axis
WINDOW = 50  # a smooth line is the mean over this part of the run
MARKED = 25  # a line of no more points shows each
# Okabe and Ito, "Color Universal Design" (2008): told apart by everyone. Raw weights come first, then the averages.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#9A9A9A"
LEVEL_COLOURS = ("viridis", 0.0, 0.88)  # from low sigma to high; its last part is too pale on white
SETS = {"held_out_loss": ("held-out", "-"), "training_loss": ("training images", ":")}


def plot(run: Path, out: Path | None = None) -> Path:
    """Draws the metrics.jsonl of a run as a PNG, by default plot.png in its folder, and returns the file's path.

    Errors as of `draw`, and SaveError."""
    figure, file = draw(run), io.BytesIO()
    figure.savefig(file, format="png")
    path = run / PICTURE if out is None else out
    write_bytes(path, file.getvalue())
    return path


def draw(run: Path) -> "Figure":
    """Loss, loss at each noise level, loss on held-out and on training images with raw and averaged weights, over the
    steps and over the noise levels; learning rate; images a second. A run that goes on while it is drawn is no harm.

    Raises InputError where there is nothing to draw, or nothing to draw with."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plot: matplotlib is not installed: pip install 'diffusion-unet[plot]'") from None
    records = load(run / METRICS)
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise InputError(f"{run / METRICS}: no step is written there yet")
    looks = [record for record in records if any(kind in record for kind in SETS)]
    _check(looks, run / METRICS)
    figure = Figure(figsize=(13, 12 if looks else 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    _draw_panels(figure, run, steps, looks)
    return figure


def _check(looks: Sequence[Mapping[str, Any]], path: Path) -> None:
    for look in looks:
        for kind in SETS:
            losses = look.get(kind, {})
            if not isinstance(losses, dict) or not all(isinstance(levels, dict) for levels in losses.values()):
                raise InputError(f"{path}: step {look['step']}: {kind} is not {{weights: {{sigma: loss}}}}")


def _draw_panels(
    figure: "Figure", run: Path, steps: Sequence[Mapping[str, Any]], looks: Sequence[Mapping[str, Any]]
) -> None:
    last = int(steps[-1]["step"])
    figure.suptitle(f"{run.resolve().name}: {last:,} steps", fontsize=15, fontweight="bold")
    panels = figure.subplots(3 if looks else 2, 2).ravel().tolist()
    for axes in panels:
        axes.grid(True, color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_loss(panels[0], steps)
    _draw_levels(panels[1], steps)
    if looks:
        _draw_looks(panels[2], looks)
        _draw_last_look(panels[3], looks)
    _draw_rate(panels[-2], steps)
    _draw_speed(panels[-1], steps, _images_per_step(run))
    for axes in panels[:3] + panels[-2:] if looks else panels:
        _step_axis(axes, last)


# ---- the panels


def _draw_loss(axes: "Axes", steps: Sequence[Mapping[str, Any]]) -> None:
    x, loss = _series(steps, "loss")
    places = _places(len(x))
    if len(x) > POINTS:
        low, high = (at(loss, places[:-1]) for at in (np.fmin.reduceat, np.fmax.reduceat))
        axes.fill_between(x[places[:-1]], low, high, color=GREY, alpha=0.35, linewidth=0, label="lowest to highest")
    else:
        axes.plot(x, loss, color=GREY, linewidth=1, label="each step", **_marks(len(x)))
    window = _window(len(x))
    if window > 1:
        shown = _thin(len(x))
        name = f"mean of {window:,} steps"
        axes.plot(x[shown], _smooth(loss, window)[shown], color=COLOURS[2], linewidth=2, label=name)
    _label(axes, "Training loss", "loss", loss)
    axes.legend(frameon=False)


def _draw_levels(axes: "Axes", steps: Sequence[Mapping[str, Any]]) -> None:
    records = [record for record in steps if record.get("levels")]
    names = _sigmas([record["levels"] for record in records])
    shown = []
    for name, colour in zip(names, _sequence(len(names)), strict=True):
        x, loss = _series([{"step": record["step"], **record["levels"]} for record in records], name)
        smooth, places = _smooth(loss, _window(len(x))), _thin(len(x))
        axes.plot(x[places], smooth[places], color=colour, linewidth=1.8, label=name, **_marks(len(x)))
        shown.append(smooth)
    _label(axes, "Training loss at each noise level", "loss", *shown)
    if names:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], title="sigma", **_BESIDE)
    else:
        _say_none(axes, "not written yet")


def _draw_looks(axes: "Axes", looks: Sequence[Mapping[str, Any]]) -> None:
    """The mean over the noise levels, which see as many images each."""
    shown = []
    for weights, colour in _weights(looks).items():
        for kind, (_, style) in SETS.items():
            found = [look for look in looks if look.get(kind, {}).get(weights)]
            x = np.array([look["step"] for look in found], dtype=np.float64)
            loss = np.array([np.mean(_values(look[kind][weights])) for look in found])
            if len(x):
                axes.plot(x, loss, style, color=colour, linewidth=1.8, **_marks(len(x)))
                shown.append(loss)
    _label(axes, "Loss on held-out and on training images", "mean over noise levels", *shown)


def _draw_last_look(axes: "Axes", looks: Sequence[Mapping[str, Any]]) -> None:
    shown = []
    for weights, colour in _weights(looks).items():
        for kind, (_, style) in SETS.items():
            levels = next((look[kind][weights] for look in reversed(looks) if look.get(kind, {}).get(weights)), None)
            if levels:
                names = _sigmas([levels])
                sigmas, loss = np.array([float(name) for name in names]), _values({n: levels[n] for n in names})
                axes.plot(sigmas, loss, style, color=colour, linewidth=1.8, marker="o", markersize=4)
                shown.append(loss)
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("sigma")
    _label(axes, f"The same at each noise level, step {looks[-1]['step']:,}", "loss", *shown)
    for name, colour in _weights(looks).items():
        axes.plot([], [], color=colour, linewidth=3, label="raw weights" if name == "raw" else f"average {name}")
    for kind, (title, style) in SETS.items():
        if any(look.get(kind) for look in looks):
            axes.plot([], [], style, color=GREY, linewidth=1.8, label=title)
    axes.legend(**_BESIDE)


def _draw_rate(axes: "Axes", steps: Sequence[Mapping[str, Any]]) -> None:
    x, rate = _series(steps, "lr")
    places = _thin(len(x))
    axes.plot(x[places], rate[places], color=COLOURS[2], linewidth=2, **_marks(len(x)))
    axes.set_title("Learning rate", loc="left", fontsize=12)
    axes.yaxis.set_major_formatter("{x:g}")
    _from_zero(axes, rate)


def _draw_speed(axes: "Axes", steps: Sequence[Mapping[str, Any]], images: float | None) -> None:
    x, seconds = _series(steps, "seconds")
    places = _places(len(x), WINDOW)
    taken, passed = np.diff(x[places]), np.diff(seconds[places])
    middles = (x[places][1:] + x[places][:-1]) / 2
    good = passed > 0
    speed = taken[good] / passed[good] * (images or 1)
    unit = "images" if images else "steps"
    axes.plot(middles[good], speed, color=COLOURS[3], linewidth=2, **_marks(len(speed)))
    axes.set_title(f"{unit.capitalize()} a second, with all that happens between steps", loc="left", fontsize=12)
    axes.set_ylabel(f"{unit}/s")
    _from_zero(axes, speed)
    if not len(speed):
        _say_none(axes, "two steps are needed")


# ---- what the panels share

_BESIDE: dict[str, Any] = {"frameon": False, "loc": "center left", "bbox_to_anchor": (1.0, 0.5)}


def _label(axes: "Axes", title: str, y: str, *shown: Floats) -> None:
    """A logarithmic axis where every loss is above zero, which a learned weight need not leave it."""
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_ylabel(y)
    values = np.concatenate(shown) if shown else np.empty(0)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0:
        from matplotlib.ticker import LogLocator

        spread = values.max() / values.min()  # with few powers of ten, numbers between them are shown too
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 3, 4, 5, 7) if spread < 8 else (1, 2, 5) if spread < 200 else (1,))
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def _from_zero(axes: "Axes", values: Floats) -> None:
    axes.set_ylim(0, 1.1 * np.nanmax(values, initial=0.0) or 1)


def _step_axis(axes: "Axes", last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.set_xlim(0, last * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _say_none(axes: "Axes", words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=GREY, fontsize=12)


def _marks(count: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if count <= MARKED else {}


def _sequence(count: int) -> list[Any]:
    import matplotlib

    name, first, last = LEVEL_COLOURS
    return [matplotlib.colormaps[name](place) for place in np.linspace(first, last, count)]


def _weights(looks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The names of the weights that were measured, in the order they were first, and their colours."""
    names = dict.fromkeys(name for look in looks for kind in SETS for name in look.get(kind, {}))
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}


def _sigmas(levels: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for each in levels for name in each}, key=float)


# ---- numbers


def _values(levels: Mapping[str, float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in levels.values()], dtype=np.float64)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[Floats, Floats]:
    """Steps and values of the records that have one; what is null is NaN."""
    found = [record for record in records if name in record]
    steps = np.array([record["step"] for record in found], dtype=np.float64)
    return steps, _values({str(place): record[name] for place, record in enumerate(found)})


def _places(count: int, most: int = POINTS) -> NDArray[np.int64]:
    """0 to `count` - 1 in at most `most` even strides, both ends among them."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most + 1)).round().astype(np.int64))


def _thin(count: int) -> NDArray[np.int64]:
    return _places(count) if count else np.empty(0, np.int64)


def _window(count: int) -> int:
    return max(1, count // WINDOW)


def _smooth(values: Floats, window: int) -> Floats:
    """The mean of the `window` values around each, of fewer at the ends; NaN counts for nothing."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
    at = np.arange(len(values))
    low, high = np.maximum(at - (window - 1) // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        mean: Floats = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return mean


def _images_per_step(run: Path) -> float | None:
    """By the newest checkpoint; None while there is none."""
    states = sorted(run.glob("checkpoint-*/state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        return None
    state = read_json(states[-1])
    return state["images_seen"] / state["step"] if state.get("step") else None
