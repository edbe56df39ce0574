"""In which order a save syncs, renames and removes, as the trace of its system calls has it.

    python benchmarks/reliability/order.py

What may be lost in a power cut is followed through the trace: data written to a file until that is synced, and names
given in a folder until the folder is. The rules, for the save of a new step and for one that replaces a checkpoint:

    files-before-manifest       the manifest is not begun before all other files, and their names, are synced
    manifest-before-rename      all files, the manifest too, and their names are synced before the folder gets its name
    rename-before-removal       the new name is synced before anything of an older checkpoint is removed
    nothing-in-place            no file of a checkpoint that has its name is ever opened for writing

A power cut itself is not made: what a disk does with a sync that it has confirmed is beyond any of this.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import Trials, parser, skipped, workplace
from forks import Forks
from kill_at_syscalls import SAVES, make_base, steps, traced
from tracing import Call, refused

RULES = ("files-before-manifest", "manifest-before-rename", "rename-before-removal", "nothing-in-place")


@dataclass
class Disk:
    """What is not yet synced: files with data, by path, and folders with names."""

    data: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)  # every name that a file was given

    def below(self, folder: str) -> list[str]:
        """All of a folder that is not synced."""
        return sorted(path for path in self.data | self.names if path == folder or path.startswith(f"{folder}/"))

    def move(self, old: str, new: str) -> None:
        """A file or folder with all in it, under another name."""
        for kept in (self.data, self.names):
            for path in [path for path in kept if path == old or path.startswith(f"{old}/")]:
                kept.remove(path)
                kept.add(new + path.removeprefix(old))
        self.names |= {str(Path(old).parent), str(Path(new).parent)}
        self.seen.add(new)

    def take(self, call: Call) -> None:
        """Follows one call that succeeded."""
        path = call.paths[-1]
        if call.name in ("write", "writev", "pwrite64", "ftruncate"):
            self.data.add(path)
        elif call.name in ("fsync", "fdatasync"):
            self.data.discard(path)
            self.names.discard(path)
        elif call.name.startswith("rename"):
            self.move(call.paths[-2], path)
        elif call.name in ("openat", "mkdir"):
            self.names.add(str(Path(path).parent))
        elif call.name in ("unlink", "rmdir"):
            self.data.discard(path)
            self.names.add(str(Path(path).parent))


def manifest(path: str) -> bool:
    return Path(path).name.removeprefix(".").startswith("manifest.json")


def breaches(calls: list[Call], run: Path, step: int) -> dict[str, list[str]]:
    """By rule, where it is broken."""
    final = str(run / f"checkpoint-{step}")
    disk, begun, named, settled = Disk(), False, False, False
    broken: dict[str, list[str]] = {rule: [] for rule in RULES}
    for call in calls:
        if call.failed or not call.below(run):
            continue
        path = call.paths[-1]
        if call.name == "openat" and manifest(path) and not begun:
            begun = True
            here = str(Path(path).parent)
            files = [name for name in disk.seen if name.startswith(f"{here}/")]
            if disk.below(here) or not files:
                broken["files-before-manifest"].append(f"of {files}, {disk.below(here)} are not synced")
        if call.name.startswith("rename") and path == final:
            named = True
            if disk.below(call.paths[-2]):
                broken["manifest-before-rename"].append(f"{disk.below(call.paths[-2])} are not synced")
        removes = call.name in ("unlink", "unlinkat", "rmdir") or "/.unfinished-old" in path
        settled = settled or (named and str(run) not in disk.names)
        if removes and of_a_checkpoint(call) and not settled:
            broken["rename-before-removal"].append(str(call))
        if call.name in ("openat", "write", "ftruncate") and Path(path).parent.name.startswith("checkpoint-"):
            broken["nothing-in-place"].append(str(call))
        disk.take(call)
    if not named:
        broken["manifest-before-rename"].append(f"nothing was renamed to {final}")
    return broken


def of_a_checkpoint(call: Call) -> bool:
    """Whether a call removes something of a checkpoint that was whole, rather than a temporary file."""
    return any(part in path for path in call.paths for part in ("/checkpoint-", ".unfinished-old-", ".replaced-"))


def prove(trials: Trials, work: Path, base: Path, forks: Forks) -> dict[str, list[Call]]:
    """Holds both kinds of save to the rules; returns the calls of each."""
    found = {}
    for kind, more in SAVES.items():
        step = steps(base)[-1] + more
        found[kind] = traced(base, work / f"order-{kind}", step, forks)
        for rule, wrong in breaches(found[kind], work / f"order-{kind}/run", step).items():
            trials.line(not wrong, save=kind, rule=rule, wrong=wrong)
    return found


def main(options: argparse.Namespace) -> int:
    if why := refused():
        return skipped("order", why)
    trials = Trials("order")
    with workplace(options.work) as work, Forks() as forks:
        prove(trials, work, make_base(work, forks), forks)
    return trials.summary()


if __name__ == "__main__":
    sys.exit(main(parser(__doc__, None).parse_args()))
