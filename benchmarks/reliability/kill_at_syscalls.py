"""kill -9 before every system call of a save, and before every one of a whole run that changes something on the disk.

    python benchmarks/reliability/kill_at_syscalls.py

A trace of one save, removal of the oldest checkpoint included, lists its calls that take a path or a descriptor; then
each in turn is the last: the process is killed as it enters the call, which is not made. Killed before each of them
is killed after each of them. Two saves are gone through: of the next step, and of the newest step once more.

After each kill: every checkpoint under its final name is as its manifest says; those before are untouched, at least
two of them; `training.checkpoint.load` finds the new one exactly from its renaming on; what a new process clears away
leaves checkpoints only; and the same save, made again, leaves the newest two.

Of a whole run by the real command, caches, pictures and metrics included, it is each call that creates, writes, syncs,
renames or removes; the same command then finishes it, and all files are those of the unbroken run.
"""

import argparse
import shutil
import sys
from pathlib import Path

from common import Trials, content, damage, make_tiny, parser, settle, skipped, workplace
from forks import Forks
from short_run import ShortRun, kind_of
from tracing import MARK, Call, Trace, refused

from training import checkpoint

HERE = Path(__file__).resolve().parent
SAVES = {"next": 1, "again": 0}  # how many steps after the newest checkpoint


def make_base(work: Path, forks: Forks) -> Path:
    """A run of two checkpoints, by training."""
    tiny, base = make_tiny(work / "tiny", steps=10), work / "base"
    if forks.start(tiny.command(base), work / "base.log").wait():
        raise SystemExit((work / "base.log").read_text())
    return base


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


def traced(base: Path, folder: Path, step: int, forks: Forks, inject: str | None = None) -> list[Call]:
    """Saves a step in a copy of the run; the calls that the save made."""
    folder.mkdir()
    run = shutil.copytree(base, folder / "run")
    process = forks.start([str(run), str(step)], folder / "log", module="save_step", folder=HERE, gate=True)
    trace = Trace(process, folder / "trace", inject)
    process.wait()
    calls = trace.end()
    begin = next(place for place, call in enumerate(calls) if MARK in call.paths)
    return calls[begin + 1 :]


def renaming(calls: list[Call], step: int) -> int:
    """Which of the calls gives the new checkpoint its name."""
    return max(place for place, call in enumerate(calls) if call.name.startswith("rename")
               and call.paths[-1].endswith(f"/checkpoint-{step}"))  # fmt: skip


def faults(run: Path, step: int, renamed: bool, old: list[int], before: dict[str, str]) -> list[str]:
    """What is wrong after a kill, before and after what a new process does first. old, before: the base's."""
    wrong = [f"{path.name}: {what}" for path in run.glob("checkpoint-*") for what in damage(path)]
    checkpoint.sweep(run)
    there = [path.name for path in run.iterdir()]
    wrong += [f"{name}: left behind" for name in there if name.startswith((".unfinished", ".replaced"))]
    found = checkpoint.load(run, wrong.append)
    new = step not in old or changed(run, step, before)
    expected = step if renamed else old[-1]
    if found is None or found.state["step"] != expected or (renamed and not new):
        wrong.append(f"{found and found.state['step']} is loaded, where {expected} was to be")
    if len(steps(run)) < 2 or (not renamed and steps(run) != old):
        wrong.append(f"checkpoints {steps(run)} are left")
    return wrong


def changed(run: Path, step: int, before: dict[str, str]) -> bool:
    """Whether a checkpoint is not that of the base."""
    name = f"checkpoint-{step}/model.safetensors"
    return content(run).get(name) != before[name]


def chosen(count: int, wanted: int | None) -> list[int]:
    """All of so many calls, or as many as are wanted, evenly."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted({round(place * (count - 1) / max(wanted - 1, 1)) for place in range(wanted)})


def go_through(trials: Trials, kind: str, base: Path, work: Path, forks: Forks, wanted: int | None) -> int:
    """Kills at every call of one kind of save; returns how many calls it makes."""
    old, before = steps(base), content(base)
    step = old[-1] + SAVES[kind]
    calls = traced(base, work / f"whole-{kind}", step, forks)
    expected = content(work / f"whole-{kind}/run")
    turn = renaming(calls, step)
    for place in chosen(len(calls), wanted):
        call, folder = calls[place], work / f"{kind}-{place}"
        made = traced(base, folder, step, forks, call.kill)
        run = folder / "run"
        wrong = faults(run, step, place > turn, old, before)
        if len(made) != place + 1 or made[-1].name != call.name:
            wrong.append(f"killed at call {len(made) - 1}, {made[-1].name}, instead")
        # From the state of the base, where it is still there, as the trainer would go on from it.
        again = forks.start([str(run), str(step)], folder / "log", module="save_step", folder=HERE)
        if again.wait() or steps(run) != sorted({*old, step})[-2:] or content(run).keys() != expected.keys():
            wrong.append(f"the save made again leaves {sorted(path.name for path in run.iterdir())}")
        wrong += [f"again: {what}" for path in run.glob("checkpoint-*") for what in damage(path)]
        settle(work, folder, trials.line(not wrong, save=kind, call=place, name=call.name, wrong=wrong))
    return len(calls)


def go_through_run(trials: Trials, short: ShortRun, wanted: int | None) -> int:
    """Kills the real command at every call that changes something; returns how many there are."""
    for place in chosen(len(short.points), wanted):
        call = short.points[place]
        folder, process, made = short.tried(f"run-{place}", call.kill)
        wrong = [] if process.code == -9 else [f"it was not killed, but ended with {process.code}"]
        kind = kind_of(made[-1], folder / "run") if made[-1].below(folder / "run") else str(made[-1])
        wrong += [f"{path.name}: {what}" for path in (folder / "run").glob("checkpoint-*") for what in damage(path)]
        wrong += short.finish(folder)
        settle(short.work, folder, trials.line(not wrong, save="run", call=place, name=call.name, of=kind, wrong=wrong))
    return len(short.points)


def main(options: argparse.Namespace) -> int:
    if why := refused():
        return skipped("kill_at_syscalls", why)
    trials = Trials("kill_at_syscalls")
    with workplace(options.work) as work, Forks() as forks:
        base = make_base(work, forks)
        counts = {kind: go_through(trials, kind, base, work, forks, options.n) for kind in SAVES}
        counts["run"] = go_through_run(trials, ShortRun(work, forks), options.n)
    return trials.summary(calls=counts)


if __name__ == "__main__":
    sys.exit(main(parser(__doc__, None).parse_args()))
