"""What `diffusion-unet check` found, for people and for programs."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from diffusion_unet.errors import in_units

if TYPE_CHECKING:
    from .footprint import Footprint

LISTED = 10  # faults of one kind that are printed; JSON has all of them
NAMED = 3  # samples that a note names
# What is said of a sample by the readers, the decoders and the look at it; the first that fits.
KINDS = {
    "outside the folder": r"outside the folder",
    "animated": r"it holds \d+ pictures",
    "too many pixels": r"has more than \d+ pixels",
    "too small": r"data\.min_size",
    "truncated": r"[Tt]runcated|become shorter|broken PNG",
    "empty caption": r"the caption is empty",
    "no caption": r"caption|\.txt member",
    "no label": r"label",
    "no image": r"is no file|no file name|no image|holds no image|no file can have this name",
    "no row": r"no JSON|cells under",
    "undecodable": r"cannot be used|cannot be read",
}


def kind_of(reason: str, name: str) -> str:
    """Of which kind the fault of the sample `name` is: a key of KINDS, or "other"."""
    words = re.sub("'[^']*'", "", reason.replace(name, ""))  # what files are called says nothing of the fault
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, words)), "other")


def some(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f", and {len(names) - NAMED} more" if len(names) > NAMED else "")


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a sample, whose file and row are `name`, or with the run, and then that is empty."""

    kind: str
    name: str
    reason: str
    stops: bool  # whether training would end by it

    def __str__(self) -> str:
        return self.reason if not self.name or self.name in self.reason else f"{self.name}: {self.reason}"


@dataclass
class Report:
    """faults: of samples and of the run; notes: what a run bears, and is good to know; figures: numbers, as JSON has
    them: images, stream, duplicates, enlarged, captions or classes, buckets, parameters, memory and disk (bytes)."""

    run: str
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def would_fail(self) -> str | None:
        """Why training would fail, in one line; None where it would not."""
        stops = [fault for fault in self.faults if fault.stops]
        if not stops:
            return None
        if len(stops) == 1:
            return f"training would fail: {stops[0]}"
        return f"training would fail, for {len(stops)} reasons; the first: {stops[0]}"

    @property
    def kinds(self) -> dict[str, int]:
        """Faults of each kind, the most frequent first."""
        return dict(Counter(fault.kind for fault in self.faults).most_common())

    def refuse(self, kind: str, reason: str) -> None:
        """Adds a fault that training would end by; the same one is told once."""
        fault = Fault(kind, "", reason, stops=True)
        if fault not in self.faults:
            self.faults.append(fault)

    def add_memory(self, taken: "Footprint") -> None:
        """Puts the memory of training among the figures."""
        self.figures["parameters"] = {"all": taken.parameters, "trained": taken.trained}
        names = ("weights", "gradients", "averages", "optimizer", "activations")
        self.figures["memory"] = {
            "images_at_a_time": taken.images,
            **{name: getattr(taken, name) for name in names},
            "together": taken.memory,
        }
        self.figures["checkpoint"] = taken.checkpoint

    def as_json(self) -> str:
        """An object with would_fail, faults, kinds, notes and figures."""
        tree = {
            "run": self.run,
            "would_fail": self.would_fail,
            "kinds": self.kinds,
            "faults": [asdict(fault) for fault in self.faults],
            "notes": self.notes,
            "figures": self.figures,
        }
        return json.dumps(tree, indent=2, allow_nan=False)

    def as_text(self) -> str:
        """A table of the figures, then the notes, then the faults, which a terminal then shows."""
        rows = [row for name in _ROWS if name in self.figures for row in _ROWS[name](self.figures)]
        kinds = Counter(fault.kind for fault in self.faults if not fault.stops)
        none = "none in samples" if "images" in self.figures else "no sample was looked at"
        rows += [("faults", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or none)]
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:{width}}{text}" for name, text in rows]
        for note in self.notes:
            lines += ["", f"note: {note}"]
        lists = [(kind, [fault for fault in self.faults if fault.kind == kind and not fault.stops]) for kind in kinds]
        lists += [("training would fail", [fault for fault in self.faults if fault.stops])]
        for title, faults in lists:
            if faults:
                lines += ["", f"{title}:", *(f"  {fault}" for fault in faults[:LISTED])]
            if len(faults) > LISTED:
                lines.append(f"  ... and {len(faults) - LISTED} more")
        return "\n".join(lines)


def _images(figures: dict[str, Any]) -> list[tuple[str, str]]:
    images = figures["images"]
    first = "the first " if "stream" in figures else ""
    text = f"{images['usable']} of {first}{images['found']} can be used"
    if "held_out" in images:
        text += f", {images['held_out']} of them held out"
    enlarged, twice = figures.get("enlarged", {}).get("images"), figures.get("duplicates", {}).get("superfluous")
    text += f", {enlarged} enlarged" if enlarged else ""
    return [("images", text + (f", {twice} superfluous" if twice else ""))]


def _captions(figures: dict[str, Any]) -> list[tuple[str, str]]:
    captions = figures["captions"]
    text = f"{captions['different']} different, at most {captions['longest']} tokens of {captions['limit']}"
    return [("captions", text + (f", {captions['too_long']} cut" if captions["too_long"] else ""))]


def _classes(figures: dict[str, Any]) -> list[tuple[str, str]]:
    counts = figures["classes"].values()
    return [("classes", f"{len(counts)}, of {min(counts)} to {max(counts)} images")]


def _buckets(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for bucket in figures["buckets"]:
        if bucket["images"]:
            (width, height), batches = bucket["size"], bucket["batches"]
            rows.append((f"{width}x{height}", f"{bucket['images']} images, {batches:.1f} batches an epoch"))
    return rows


def _parameters(figures: dict[str, Any]) -> list[tuple[str, str]]:
    numbers = figures["parameters"]
    return [("parameters", f"{_short(numbers['all'])}, {_short(numbers['trained'])} of them trained")]


def _memory(figures: dict[str, Any]) -> list[tuple[str, str]]:
    memory = figures["memory"]
    images = memory["images_at_a_time"]
    parts = [f"weights {in_units(memory['weights'])}", f"gradients {in_units(memory['gradients'])}"]
    parts += [f"averages {in_units(memory['averages'])}"] if memory["averages"] else []
    known = memory["optimizer"] is not None
    parts += [f"optimizer {in_units(memory['optimizer']) if known else 'not known'}"]
    parts += [f"activations {in_units(memory['activations'])}"]
    first = f"about {in_units(memory['together'])} on one process, {images} images at a time"
    return [("memory", first + ("" if known else ", and the optimizer")), ("", ", ".join(parts))]


def _disk(figures: dict[str, Any]) -> list[tuple[str, str]]:
    disk = figures["disk"]
    parts = [f"{name} {in_units(count)}" for name, count in disk["needed"].items() if count]
    free = ", ".join(f"{in_units(count)} at {place}" for place, count in disk["free"].items())
    return [("disk", f"{', '.join(parts) or 'nothing'} to be written; free: {free}")]


_ROWS = {
    "images": _images,
    "captions": _captions,
    "classes": _classes,
    "buckets": _buckets,
    "parameters": _parameters,
    "memory": _memory,
    "disk": _disk,
}


def _short(count: int) -> str:
    value, unit = float(count), ""
    for larger in (" thousand", " million", " billion"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}" if not unit else f"{value:.1f}{unit}"
