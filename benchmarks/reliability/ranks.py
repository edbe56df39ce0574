"""One of two processes killed (kill -9) or frozen (SIGSTOP): all end in 15 s, and torchrun goes on to the same bits.

    python benchmarks/reliability/ranks.py --n 30 --freezes 10

A trial is a fresh run folder, `torchrun --max-restarts=1`, and one signal to one rank, each in turn, at an instant that
is uniform from when the run folder is there until the last checkpoint. Measured are the seconds from the signal
until both processes have ended, the frozen one too, and whether a line names the rank. Then torchrun is left to itself:
it must end with 0, nothing of it may be left running, and every file of the run folder must be as of an unbroken run.
"""

import argparse
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import STEPS, Result, Tiny, Trials, content, differences, make_tiny, parser, settle, workplace
from forks import Running, alive, descendants, start_process, torchrun
from kill_anywhere import phase

LIMIT = 15.0  # seconds
PATIENCE = 300.0  # seconds for a start, or a run, on a machine that is busy
TICK = 0.005
LAST = f"checkpoint-{STEPS}"
FIRST = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank")  # as torchrun tells of it


def start(tiny: Tiny, run: Path) -> Running:
    command = torchrun(2, "--max-restarts=1", "-m", "diffusion_unet", *tiny.command(run))
    return start_process(command, run.with_suffix(".log"))


def wait_for(what: Callable[[], bool], running: Running, seconds: float = PATIENCE) -> bool:
    """Whether it came about before torchrun ended, or so many seconds had passed."""
    until = time.monotonic() + seconds
    while not what():
        if running.ended(TICK) or time.monotonic() > until:
            return what()
    return True


def ranks(running: Running) -> dict[int, int]:
    """The processes by rank, of those that torchrun has started itself."""
    found = {}
    for pid in descendants(running.pid):
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        number = [int(setting[5:]) for setting in settings if setting.startswith(b"RANK=")]
        if number and int(words[1]) == running.pid:
            found[number[0]] = pid
    return found


def unbroken(tiny: Tiny, run: Path) -> tuple[dict[str, str], float]:
    """What a run that nothing befalls leaves, and the seconds from when its folder is there to its last checkpoint."""
    running = start(tiny, run)
    wait_for((run / ".lock").exists, running)
    begun = time.monotonic()
    wait_for((run / LAST).exists, running)
    seconds = time.monotonic() - begun
    if running.wait(PATIENCE):
        raise SystemExit(f"the unbroken run failed: {running.text()}")
    return content(run), seconds


def trial(running: Running, run: Path, number: int, rank: int, after: float) -> Result | None:
    """What became of a run of which a rank was sent a signal; None where it had come to its end before."""
    wait_for((run / ".lock").exists, running)
    time.sleep(after)
    pids, family = ranks(running), descendants(running.pid)
    if len(pids) < 2 or (run / LAST).exists():
        running.wait(PATIENCE)
        return None
    what = phase(run)
    os.kill(pids[rank], number)
    begun = time.monotonic()
    left = alive(list(pids.values()), 4 * LIMIT)
    seconds = time.monotonic() - begun
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: bool(ranks(running)), running)
    family += descendants(running.pid)
    code = running.wait(PATIENCE)
    name = f"rank {rank} of 2 (process {pids[rank]} on "
    return {
        "what": f"{signal.Signals(number).name} of rank {rank}, {what}",
        "after": round(after, 3),
        "seconds_to_end": round(seconds, 2),
        "codes": {"torchrun": code, "first_ended": [int(code) for code in FIRST.findall(running.text())]},
        "lines": [line for line in running.errors() if name in line],
        "left_running": left + alive(family, LIMIT),
    }


def main(options: argparse.Namespace) -> int:
    chance, trials = random.Random(options.seed), Trials("ranks")
    kinds = [signal.SIGKILL] * options.n + [signal.SIGSTOP] * options.freezes
    with workplace(options.work) as work:
        tiny = make_tiny(work / "tiny")
        expected, seconds = unbroken(tiny, work / "unbroken")
        while trials.trials < len(kinds):
            folder = work / f"trial-{trials.trials}"
            folder.mkdir()
            run, kind = folder / "run", kinds[trials.trials]
            running = start(tiny, run)
            try:
                result = trial(running, run, kind, trials.trials % 2, chance.uniform(0, seconds))
            finally:
                if running.code is None:
                    running.kill_family()
            if result is None:
                settle(work, folder, True)
                continue
            wrong = differences(expected, run)
            fine = result["seconds_to_end"] <= LIMIT and result["lines"] and not result["left_running"]
            ok = bool(fine) and result["codes"]["torchrun"] == 0 and not wrong
            settle(work, folder, trials.line(ok, **result, same_hash=not wrong, wrong=wrong))
        slowest = max((line["seconds_to_end"] for line in trials.lines), default=0.0)
        return trials.summary(kills=options.n, freezes=options.freezes, slowest_end=slowest)


if __name__ == "__main__":
    options = parser(__doc__, 30)
    options.add_argument(
        "--freezes", type=int, default=10, help="trials with SIGSTOP, besides the --n with kill -9 (10)"
    )
    sys.exit(main(options.parse_args()))
