"""SIGTERM or Ctrl-C at any instant: stopped soon and saved, and the same command goes on to the same bits.

    python benchmarks/reliability/stop_anywhere.py --n 50
    python benchmarks/reliability/stop_anywhere.py --n 50 --processes 2

A trial is a fresh run folder and one signal, at an instant spread evenly over the time that a whole run takes: the
look at the images, caching, steps, pictures, saves. SIGTERM and SIGINT take turns; SIGTERM goes to the process, SIGINT
to its group, as a terminal sends it. Of two processes it is torchrun that is told, at instants from the moment on at
which the run folder is there.

Then: the run ends within ten seconds; with code 75, or of two with the launcher's; the newest checkpoint holds every
step that metrics.jsonl tells of; what is left is no debris; and the same command ends as the unbroken run did. A
signal before the run has begun, while torch is read, ends the process as it does any other.
"""

import argparse
import random
import signal
import sys
import time
from pathlib import Path

from common import Result, Trials, content, damage, differences, make_tiny, metrics, newest, parser, settle, workplace
from forks import Forks, Running, alive, descendants, start_process, torchrun
from kill_anywhere import EVERY, Start, Whole, phase, starters, unbroken

SECONDS = 10.0
PATIENCE = 300.0  # seconds for a run that two processes finish
STOPPED = 75
KEPT = 2  # checkpoints, unless settings say otherwise
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def begun(run: Path) -> bool:
    """Whether the run has its folder, and its lock on it."""
    return (run / ".lock").exists()


def trial(run: Path, start: Start, number: int, instant: float, processes: int) -> Result:
    """Signals a run after so many seconds. Where it had ended by then, {"over": the seconds that it took}."""
    running = start(run)
    counted = time.monotonic()
    if processes > 1:
        while not begun(run):
            if running.ended(0.01):
                raise SystemExit(running.text())
        counted = time.monotonic()
    if running.ended(instant):
        return {"over": time.monotonic() - counted, "code": running.wait()}
    had_begun, children, since = begun(run), descendants(running.pid), time.monotonic()
    running.signal(number, group=number == signal.SIGINT)
    wrong = []
    code = running.wait(6 * SECONDS)
    seconds = time.monotonic() - since
    if code == 0 or f"{run}: finished" in running.text():  # there was nothing left to be stopped
        return {"over": instant, "code": 0}
    where = phase(run) if had_begun else "before the run"
    if seconds > SECONDS:
        wrong.append(f"took {seconds:.1f} s")
    wrong += [f"process {pid} has outlived the run" for pid in alive(children, SECONDS)]
    if processes == 1 and code != STOPPED and had_begun:
        wrong.append(f"exit code {code}: {running.text()[-300:]}")
    wrong += lost(run)
    name = signal.Signals(number).name
    return {
        "signal": name,
        "after": round(instant, 3),
        "in": where,
        "code": code,
        "s": round(seconds, 2),
        "wrong": wrong,
    }


def lost(run: Path) -> list[str]:
    """Steps that were done and are in no checkpoint, and what a save left behind."""
    found = newest(run)
    saved, lines = found[0] if found else 0, metrics(run)
    done = lines[-1]["step"] if lines else 0
    wrong = [f"step {done} was done, and step {saved} is the newest saved"] if done != saved else []
    wrong += [f"{path.name}: left behind" for path in run.glob(".unfinished-*")]
    return wrong + [f"{path.name}: {what}" for path in run.glob("checkpoint-*") for what in damage(path)]


def with_launcher(tiny: Path, processes: int) -> Start:
    def start(run: Path) -> Running:
        line = ["-m", "diffusion_unet", "train", str(tiny / "config.yaml"), f"--train.output_dir={run}"]
        return start_process(torchrun(processes, *line), run.with_suffix(".log"))

    return start


def together(work: Path, start: Start) -> tuple[dict[str, str], float]:
    """What an unbroken run of several processes leaves, and its seconds from the run folder on."""
    run = work / "unbroken"
    running = start(run)
    while not begun(run) and not running.ended(0.01):
        pass
    since = time.monotonic()
    if running.wait(PATIENCE):
        raise SystemExit(running.text())
    return content(run), time.monotonic() - since


def prove(
    trials: Trials,
    work: Path,
    start: dict[str, Start],
    whole: Whole,
    n: int,
    seed: int,
    processes: int = 1,
) -> Result:
    """Stops and finishes `n` runs. start: ways to begin one, of which the second is for every tenth."""
    chance, (expected, seconds), tried = random.Random(seed), whole, 0
    usual, *others = start
    while trials.trials < n:
        via = others[0] if others and trials.trials % EVERY == EVERY - 1 else usual
        folder = work / f"stopped-{tried}"
        folder.mkdir()
        tried += 1
        instant = (trials.trials + chance.random()) / n * seconds[via]
        result = trial(folder / "run", start[via], SIGNALS[trials.trials % 2], instant, processes)
        if result["code"] == 0:
            seconds[via] = result["over"]
            settle(work, folder, True)
            continue
        wrong = result.pop("wrong", ["it ended before it was told to"])
        if code := start[via](folder / "run").wait(PATIENCE):
            wrong.append(f"the same command ends with {code}")
        wrong += differences(expected, folder / "run", older=False)
        kept = len([*(folder / "run").glob("checkpoint-*")])
        wrong += [] if kept == KEPT else [f"{kept} checkpoints are kept"]
        settle(work, folder, trials.line(not wrong, via=via, **result, wrong=wrong))
    return {"slowest_seconds": max((line["s"] for line in trials.lines), default=0)}


def main(options: argparse.Namespace) -> int:
    processes = options.processes
    trials = Trials("stop_anywhere" if processes == 1 else f"stop_anywhere_{processes}_processes")
    with workplace(options.work) as work, Forks() as forks:
        tiny = make_tiny(work / "tiny")
        if processes == 1:
            start = starters(tiny, forks)
            whole = unbroken(work, start)
        else:
            start = {"torchrun": with_launcher(tiny.folder, processes)}
            expected, seconds = together(work, start["torchrun"])
            whole = expected, {"torchrun": seconds}
        return trials.summary(**prove(trials, work, start, whole, options.n, options.seed, processes))


if __name__ == "__main__":
    made = parser(__doc__, 50)
    made.add_argument("--processes", type=int, default=1, help="of the run; more than one are started by torchrun")
    sys.exit(main(made.parse_args()))
