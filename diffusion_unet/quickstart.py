"""The quickstart: one training config through the functions that everybody uses, to pictures and a score."""

import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import command
from .errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .model import DiffusionModel

SEEDS = range(8)  # pictures of each prompt in samples.png
BATCH = 60  # pictures drawn at once
IMAGES_PER_CLASS = 12  # pictures of each noun that are scored, once in the trained wordings, once in held-out ones


def quickstart(
    folder: Path,
    settings: dict[str, Any],
    *,
    train: Callable[[], Path],
    export: Callable[[Path, Path], Path],
    load: Callable[[Path], "DiffusionModel"],
    draw: Callable[..., list["Image"]],
    score: Callable[..., dict[str, Any]],
) -> None:
    """Trains, exports to `folder/model`, loads only that again, draws `samples.png`, scores into `metrics.json`.

    `settings` are those of the run, as JSON holds them: the work is done when metrics.json holds the same. A run that
    was stopped goes on where it was."""
    laps = _Laps()
    from .checkpoint import write_json
    from .images import grid, save_png
    from .untrusted import read_json

    model_folder, samples, metrics = folder / "model", folder / "samples.png", folder / "metrics.json"
    if metrics.exists() and samples.exists() and read_json(metrics).get("settings") == settings:
        print("Finished already; to begin anew, remove the folder or give another --output-dir.")
        _tell_where(folder, read_json(metrics))
        return
    steps, validation = settings["train"]["max_train_steps"], settings["validation"]
    prompts = validation["validation_prompts"]
    if not prompts:
        raise InputError("validation.validation_prompts: there are none, so nothing would be drawn")
    run = train()
    state = read_json(run / f"checkpoint-{steps}" / "state.json")
    laps.end("train", at_least=state["seconds"])
    export(run, model_folder)
    model = load(model_folder)
    laps.end("export and load")
    drawing = {
        "steps": validation["num_inference_steps"],
        "guidance_scale": validation["guidance_scale"],
        "batch_size": BATCH,
    }
    save_png(samples, grid(draw(model, prompts, SEEDS, **drawing), prompts, len(SEEDS)))
    laps.end("draw")
    scores = score(model, IMAGES_PER_CLASS, **drawing)
    laps.end("score")
    result = {
        **scores,
        "images_seen": state["images_seen"],
        "images_per_second": round(state["images_seen"] / state["seconds"], 1),
        "seconds": round(sum(laps.seconds.values()), 1),
        "seconds_by_part": laps.seconds,
        "peak_memory_gb": _peak_memory(),
        "settings": settings,
    }
    write_json(metrics, result)
    _tell_where(folder, result)


class _Laps:
    """Seconds from one end to the next, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def end(self, name: str, at_least: float = 0.0) -> None:
        """`at_least` is what earlier processes have spent on it too."""
        now = time.perf_counter()
        self.seconds[name] = round(max(now - self._start, at_least), 1)
        self._start = now


def _peak_memory() -> float:
    """The most memory this process has held so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def _tell_where(folder: Path, result: dict[str, Any]) -> None:
    accuracy = result["prompt_accuracy"]
    print(
        f"""
The model       {folder / "model"}  (a diffusers folder)
Its pictures    {folder / "samples.png"}
Its scores      {folder / "metrics.json"}
                prompt accuracy {accuracy["trained"]:.2f}, in wordings not trained on {accuracy["held_out"]:.2f}\
 (photographs {result["ceiling"]:.2f}, chance 0.10)
Next, type:     {command()} sample {shlex.quote(str(folder / "model"))} "a photo of a sneaker" --seeds 0-7 --out out"""
    )
