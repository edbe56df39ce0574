"""kill -9 at any instant, and the same command again until the run is finished: the same bits as of an unbroken run.

    python benchmarks/reliability/kill_anywhere.py --n 200

A trial is a fresh run folder and one to three kills of the whole process group, each at an instant uniform over the
time that a whole run takes; the first ones of all trials are spread over it evenly. Compared with the unbroken run is
every file of the folder: weights, average and optimizer, metrics.jsonl and the state but for times, pictures, caches,
and that there is no other file. Every tenth trial starts new interpreters, the others fork one (forks.py).
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import Result, Tiny, Trials, content, damage, differences, make_tiny, newest, parser, settle, workplace
from forks import Forks, Running, alive, start_process

EVERY = 10  # trials, of which one starts new interpreters
MOST_KILLS = 3

Start = Callable[[Path], Running]
Whole = tuple[dict[str, str], dict[str, float]]  # what an unbroken run leaves, and its seconds by the way it is started


def phase(run: Path) -> str:
    """What a run was doing when it was killed, as its folder tells."""
    hidden = [path.name for path in run.glob(".unfinished-*")]
    if any("old-" in name for name in hidden):
        return "removing"
    if hidden:
        return "saving"
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # behind the last line end is one cut short
    if not lines:
        return "before the first step"
    step = json.loads(lines[-1])["step"]
    due = step % 20 == 0 and not (run / f"previews/step_{step:06d}.png").exists()
    return "preview" if due else "training"


def torn(run: Path) -> list[str]:
    """Checkpoints under their final names that are not whole."""
    return [f"{path.name}: {what}" for path in run.glob("checkpoint-*") for what in damage(path)]


def trial(run: Path, start: Start, chance: random.Random, first: float, whole: float) -> Result:
    """Kills a run and finishes it. first: seconds to the first kill; whole: those of an unbroken run.

    Where it has ended before the first kill, {"over": the seconds that it took}."""
    kills, wrong = [], []
    instants = [first, *(chance.uniform(0, whole) for _ in range(chance.randint(1, MOST_KILLS) - 1))]
    for instant in instants:
        running = start(run)
        if running.ended(instant):
            took = time.monotonic() - running.begun
            if running.wait() or not kills:
                return {"kills": kills, "code": running.code, "wrong": wrong, "over": took}
            break
        children = running.kill()
        wrong += [f"process {pid} has outlived the run" for pid in alive(children, 10.0)]
        found = newest(run)
        kills.append({"after": round(instant, 3), "in": phase(run), "step": found[0] if found else 0})
        wrong += torn(run)
    code = start(run).wait()
    return {"kills": kills, "code": code, "wrong": wrong}


def starters(tiny: Tiny, forks: Forks) -> dict[str, Start]:
    def fork(run: Path) -> Running:
        return forks.start(tiny.command(run), run.with_suffix(".log"))

    def process(run: Path) -> Running:
        return start_process(["-m", "diffusion_unet", *tiny.command(run)], run.with_suffix(".log"))

    return {"fork": fork, "process": process}


def unbroken(work: Path, start: dict[str, Start]) -> Whole:
    """What an unbroken run leaves, which is the same either way, and the seconds that it takes."""
    expected: dict[str, str] = {}
    seconds = {}
    for via, begin in start.items():
        run, begun = work / f"unbroken-{via}", time.monotonic()
        if begin(run).wait():
            raise SystemExit(f"the unbroken run failed: {run.with_suffix('.log').read_text()}")
        seconds[via] = time.monotonic() - begun
        expected = expected or content(run)
        if other := differences(expected, run):
            raise SystemExit(f"two unbroken runs are not the same: {other}")
    return expected, seconds


def prove(
    trials: Trials,
    work: Path,
    start: dict[str, Start],
    whole: tuple[dict[str, str], dict[str, float]],
    n: int,
    seed: int,
) -> Result:
    """Kills and finishes `n` runs. start: ways to begin one, "fork" among them; whole: as of `unbroken`."""
    chance, (expected, seconds), tried = random.Random(seed), whole, 0
    while trials.trials < n:
        via = "process" if "process" in start and trials.trials % EVERY == EVERY - 1 else "fork"
        folder = work / f"killed-{tried}"
        folder.mkdir()
        tried += 1
        first = (trials.trials + chance.random()) / n * seconds[via]
        result = trial(folder / "run", start[via], chance, first, seconds[via])
        if result["code"] == 0 and "over" in result:
            seconds[via] = result["over"]
            settle(work, folder, True)
            continue
        wrong = result.pop("wrong") + differences(expected, folder / "run")
        settle(work, folder, trials.line(not wrong and result["code"] == 0, via=via, **result, wrong=wrong))
    kills = [kill for line in trials.lines for kill in line["kills"]]
    killed_in = {name: sum(kill["in"] == name for kill in kills) for name in sorted({kill["in"] for kill in kills})}
    return {"kills": len(kills), "killed_in": killed_in, "seconds_of_a_run": round(seconds["fork"], 2)}


def main(options: argparse.Namespace) -> int:
    trials = Trials("kill_anywhere")
    with workplace(options.work) as work, Forks() as forks:
        start = starters(make_tiny(work / "tiny"), forks)
        if options.n < EVERY:
            del start["process"]
        return trials.summary(**prove(trials, work, start, unbroken(work, start), options.n, options.seed))


if __name__ == "__main__":
    sys.exit(main(parser(__doc__, 200).parse_args()))
