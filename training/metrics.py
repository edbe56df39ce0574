"""What a run writes down of itself: metrics.jsonl, the loss at each noise level, accelerate's trackers.

A line of metrics.jsonl is one of

    {"step": 20, "loss": 0.31, "lr": 0.001, "grad_norm": 0.8, "seconds": 4.2, "levels": {"0.0871": 0.12, ...}}
    {"step": 500, "held_out_loss": {"raw": {"0.0871": 0.13, ...}, "0.9999": {...}}, "training_loss": {...}}

with `levels` at every LEVELS_EVERY-th step, and under the names of the averages what training/evaluate.py measures.
A number that is not finite is null, as JSON has no other word for it.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_unet.checkpoint import write_bytes
from diffusion_unet.errors import InputError, SaveError

METRICS = "metrics.jsonl"
LOGS = "logs"  # folder, in that of the run, of trackers that write files
LEVELS_EVERY = 20  # steps from one loss per noise level to the next


class Metrics:
    """metrics.jsonl of the run in `folder`, and `trackers` beside it.

    main: whether this process writes; the others' calls do nothing. trackers: with .log(values, step) and .finish(), as
    accelerate's."""

    def __init__(self, folder: Path, *, main: bool, trackers: Sequence[Any] = ()):
        self.path, self.main, self.trackers = folder / METRICS, main, trackers

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; `record` has a "step". Raises SaveError when it cannot be written."""
        if not self.main:
            return
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        try:
            # One call: a buffer would be written again at its end, and what had failed would stand there after all.
            with open(self.path, "ab", buffering=0) as file:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written ({error.strerror}); make room, and go on") from error
        values = flatten({name: value for name, value in record.items() if name != "step"})
        for tracker in self.trackers:
            tracker.log(values, step=record["step"])

    def trim(self, step: int, *, looked: bool = True) -> None:
        """Takes out what was written after `step`, the newest checkpoint's: those steps are done again.

        looked: whether the held-out loss of that step was measured before; otherwise that is done again too."""
        if not self.main or not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().splitlines():
            record = _parse(line)
            if record and (record["step"] < step or (record["step"] == step and (looked or "loss" in record))):
                kept.append(line + b"\n")
        write_bytes(self.path, b"".join(kept))

    def close(self) -> None:
        """Lets every tracker write what it still holds."""
        for tracker in self.trackers if self.main else ():
            tracker.finish()


def load(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without lines that were cut short. Raises InputError when it cannot be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is this the folder of a run?") from None
    return [record for record in map(_parse, lines) if record]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"held_out_loss": {"raw": {"0.05": 1.0}}} -> {"held_out_loss/raw/0.05": 1.0}; what is None is left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the loss at each noise level


class LevelLosses:
    """Mean loss of the images in each of several ranges of sigma, since it was last asked for.

    middles [n] name the ranges, edges [n - 1] part them; both are sigmas, rising. reduce: the sum over all processes of
    a float64 tensor on the CPU; the methods that need it are called by all processes together. main: whether this
    process keeps what was counted before a checkpoint."""

    def __init__(
        self,
        middles: Sequence[float],
        edges: Sequence[float],
        reduce: Callable[[Tensor], Tensor] | None = None,
        *,
        main: bool = True,
    ):
        if len(edges) != len(middles) - 1:
            raise ValueError(f"{len(middles)} ranges have {len(middles) - 1} edges between them, not {len(edges)}")
        self.names = [f"{middle:.4g}" for middle in middles]
        self._edges = torch.tensor(list(edges), dtype=torch.float64)
        self._reduce, self._main = reduce, main
        self._totals = torch.zeros(2, len(self.names), dtype=torch.float64)  # sums and counts
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, sigma: Tensor, losses: Tensor) -> None:
        """Counts this process's images: sigma [B] and losses [B], on any device.

        They are looked at when they are asked for: to look at once would be to wait for the device."""
        self._waiting.append((sigma.detach(), losses.detach()))

    def take(self) -> dict[str, float]:
        """{"0.0871": mean loss, ...} over all processes, of ranges that had an image, and starts again from nothing."""
        totals = self._gather()
        self._totals = torch.zeros_like(totals)
        return {
            name: total / count for name, total, count in zip(self.names, *totals.tolist(), strict=True) if count > 0
        }

    def state(self) -> dict[str, list[float]]:
        """Sums and counts over all processes, for a checkpoint's JSON.

        Here too they are from then on the main process's: a run that is resumed adds in the same order."""
        totals = self._gather()
        self._totals = totals if self._main else torch.zeros_like(totals)
        sums, counts = totals.tolist()
        return {"sums": sums, "counts": counts}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Goes on from what `state` gave. Raises InputError where it is of other ranges."""
        totals = torch.tensor([list(state["sums"]), list(state["counts"])], dtype=torch.float64)
        if totals.shape != self._totals.shape:
            raise InputError(f"losses of {totals.shape[1]} noise levels in the checkpoint, of {len(self.names)} here")
        self._totals, self._waiting = totals if self._main else torch.zeros_like(totals), []

    def _gather(self) -> Tensor:
        for sigma, losses in self._waiting:
            places = torch.bucketize(sigma.to("cpu", torch.float64), self._edges)
            values = losses.cpu().double()
            self._totals[0].index_add_(0, places, values)
            self._totals[1].index_add_(0, places, torch.ones_like(values))
        self._waiting = []
        return self._totals.clone() if self._reduce is None else self._reduce(self._totals.clone())


# ---- trackers


def tracker_settings(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `Accelerator(...)` is given so that it logs with these trackers of its own (`train.report_to`).

    Raises InputError for a name that it does not know, or whose package is not installed."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType, ProjectConfiguration

    known = [name for name in LoggerType.list() if name != LoggerType.ALL]
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in known:
            raise InputError(f"train.report_to: {name} is no tracker that accelerate knows: take one of {known}")
        if name not in installed:
            raise InputError(
                f"train.report_to: {name} is not installed: pip install {name.replace('_', '-')}, or take it out"
            )
    if not names:
        return {}
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / LOGS))
    return {"log_with": list(names), "project_config": project}


def open_trackers(accelerator: Any, folder: Path, settings: Mapping[str, Any], step: int = 0) -> Sequence[Any]:
    """Starts the accelerator's trackers for the run in `folder`, and returns them, for `Metrics`.

    settings: of the run, nested; step: of the checkpoint that it goes on from, after which what TensorBoard holds is
    hidden. Called by all processes; no trackers, nothing done."""
    if not accelerator.log_with:
        return []
    flat = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flatten(settings).items()
    }
    # Also of a run that begins again, after it had ended before its first checkpoint.
    hidden = {"tensorboard": {"purge_step": step + 1}}
    accelerator.init_trackers(folder.resolve().name, config=flat, init_kwargs=hidden)
    trackers: Sequence[Any] = accelerator.trackers
    return trackers
