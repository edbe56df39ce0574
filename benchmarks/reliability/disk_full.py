"""No space left, or a write error, at every call of a run that writes: exit code 4, one line, nothing lost.

    python benchmarks/reliability/disk_full.py

Three ways. `injected`: strace has each call in turn that creates, writes, syncs or renames a file of a short run fail,
with ENOSPC and, where data goes to the disk, with EIO; the run is the real command, from its first write on: model,
caches, index, list of bad samples, metrics, pictures, checkpoints. `export`: the same for `diffusion-unet export`.
`tmpfs`: the run folder is a file system that is really too small, of another size each time, which is then enlarged.

Each time: exit code 4; one line of error, with the path and, for checkpoints, the bytes needed; no file is left that a
finished run would not have; every checkpoint is whole, and the newest one is there; and the same command, run again
when there is room, ends as the unbroken run did.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from common import Result, Trials, content, parser, settle, skipped, workplace
from forks import Forked, Forks
from kill_at_syscalls import chosen
from short_run import ShortRun, kind_of
from tracing import Call, Trace, refused

ERRORS = {
    "ENOSPC": ("openat", "write", "fsync", "rename", "renameat", "mkdir", "ftruncate"),
    "EIO": ("write", "fsync", "rename"),
}
SAVE_ERROR = 4
SIZES = 20  # file systems that are too small
INSIDE = "RELIABILITY_INSIDE"  # set in a process that may mount


def told(process: Forked, below: Path, *, bytes_too: bool) -> list[str]:
    """What is wrong with how a process ended that could not write."""
    wrong = [] if process.code == SAVE_ERROR else [f"exit code {process.code}"]
    text, errors = process.text(), process.errors()
    if "Traceback" in text:
        wrong.append(f"a traceback: {text.splitlines()[-1]}")
    elif len(errors) != 1:
        wrong.append(f"{len(errors)} lines of error")
    elif str(below) not in errors[0]:
        wrong.append(f"no path: {errors[0]}")
    elif bytes_too and not re.search(r"\d bytes .*needed", errors[0]):
        wrong.append(f"no bytes needed: {errors[0]}")
    return wrong


def points(calls: list[Call], wanted: int | None) -> list[tuple[str, Call]]:
    """Each error, and each call that is to fail with it."""
    found = [(error, call) for error, names in ERRORS.items() for call in calls if call.name in names]
    return [found[place] for place in chosen(len(found), wanted)]


def injected(trials: Trials, short: ShortRun, wanted: int | None) -> None:
    for place, (error, call) in enumerate(points(short.points, wanted)):
        folder, process, made = short.tried(f"injected-{place}", call.fail(error))
        run = folder / "run"
        hit = [one for one in made if "(INJECTED)" in one.text]
        kind = kind_of(call, short.work / "short-whole/run")
        if len(hit) != 1 or not hit[0].below(run):
            wrong = [f"not the call that was meant: {[str(one) for one in hit]}"]
        else:
            kind = kind_of(hit[0], run)
            wrong = told(process, run, bytes_too=kind == "checkpoint") + short.left_behind(run)
        wrong += short.finish(folder)
        facts = {"how": "injected", "error": error, "call": call.name, "of": kind, "code": process.code}
        settle(short.work, folder, trials.line(not wrong, **facts, wrong=wrong))


def export(trials: Trials, short: ShortRun, wanted: int | None) -> None:
    """Exports the whole run into FOLDER/model."""
    run = short.work / "short-whole/run"
    before = content(run)

    def traced(folder: Path, inject: str | None = None) -> tuple[Forked, list[Call]]:
        (folder / "out").mkdir(parents=True)
        process = short.forks.start(["export", run, folder / "out/model"], folder / "log", gate=True)
        trace = Trace(process, folder / "trace", inject)
        process.wait()
        return process, trace.end()

    whole = short.work / "export-whole"
    _, calls = traced(whole)
    files = content(whole / "out/model")
    calls = [call for call in calls if call.below(whole / "out") and not call.failed]
    for place, (error, call) in enumerate(points(calls, wanted)):
        folder = short.work / f"export-{place}"
        process, made = traced(folder, call.fail(error))
        if not any("(INJECTED)" in one.text and one.below(folder / "out") for one in made):
            wrong = ["not the call that was meant"]
        else:
            wrong = told(process, folder / "out", bytes_too=False)
        # A model under its name is whole, or is not there.
        left = [] if content(folder / "out/model") == files else (folder / "out").iterdir()
        wrong += [f"{path.name}: left behind" for path in left]
        wrong += ["the run was changed"] if content(run) != before else []
        again = short.forks.start(["export", run, folder / "out/model"], folder / "log").wait()
        if again or content(folder / "out/model") != files:
            wrong.append("exported again it is another model")
        facts = {"how": "export", "error": error, "call": call.name, "code": process.code}
        settle(short.work, folder, trials.line(not wrong, **facts, wrong=wrong))


def tmpfs(trials: Trials, short: ShortRun, chance: random.Random, count: int) -> None:
    """Runs on file systems that are too small, by more and by less."""
    whole = short.work / "short-whole/run"
    needed = sum(path.stat().st_size for path in whole.rglob("*"))
    for number in range(count):
        size = int(needed * (number + chance.random()) / count)
        folder = short.work / f"tmpfs-{number}"
        run = folder / "run"
        run.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", run], check=True)
        process = short.start(folder)
        process.wait()
        facts: Result = {"how": "tmpfs", "bytes": size, "needed": needed, "code": process.code}
        wrong = told(process, run, bytes_too="checkpoint" in "".join(process.errors())) + short.left_behind(run)
        subprocess.run(["mount", "-o", f"remount,size={16 * needed}", run], check=True)
        wrong += short.finish(folder)
        ok = trials.line(not wrong, **facts, wrong=wrong)
        if not ok:
            shutil.copytree(run, folder / "left")
        subprocess.run(["umount", run], check=True)
        settle(short.work, folder, ok)


def mounts() -> bool:
    """Whether a file system can be mounted here, for this process alone; it then begins anew where that is so."""
    if os.environ.get(INSIDE):
        return True
    prefix = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") and not subprocess.run([*prefix, "true"], capture_output=True).returncode:
        os.environ[INSIDE] = "yes"
        os.execvp(prefix[0], [*prefix, sys.executable, *sys.argv])
    return False


def main(options: argparse.Namespace) -> int:
    mountable, untraceable = mounts(), refused()
    if untraceable:
        return skipped("disk_full", untraceable)
    trials, chance = Trials("disk_full"), random.Random(options.seed)
    with workplace(options.work) as work, Forks() as forks:
        short = ShortRun(work, forks)
        injected(trials, short, options.n)
        export(trials, short, options.n)
        if mountable:
            tmpfs(trials, short, chance, SIZES if options.n is None else min(options.n, SIZES))
    return trials.summary(tmpfs=mountable)


if __name__ == "__main__":
    sys.exit(main(parser(__doc__, None).parse_args()))
