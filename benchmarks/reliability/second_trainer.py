"""A second trainer on the folder of a run that is under way: refused at once, and the first goes on undisturbed.

    python benchmarks/reliability/second_trainer.py --n 20

At instants spread evenly over a run the same command is started beside it: exit code 2, one line that names the run
folder. The first ends as the unbroken run did; or, every second time, it is killed with kill -9, whereupon the same
command is let in at once.
"""

import argparse
import random
import sys
from pathlib import Path

from common import Tiny, Trials, differences, make_tiny, parser, settle, workplace
from forks import Forks
from kill_anywhere import Whole, starters, unbroken

REFUSED = 2
EARLY = 0.6  # of a run: the second one takes a while to begin


def prove(trials: Trials, work: Path, tiny: Tiny, forks: Forks, whole: Whole, n: int, seed: int) -> None:
    """Starts `n` runs, and a second trainer beside each."""
    chance, (expected, seconds), tried = random.Random(seed), whole, 0
    start = starters(tiny, forks)["fork"]
    while trials.trials < n:
        folder = work / f"two-{tried}"
        folder.mkdir()
        tried += 1
        run = folder / "run"
        first = start(run)
        while not (run / ".lock").exists() and not first.ended(0.001):
            pass
        over = first.ended((trials.trials + chance.random()) / n * EARLY * seconds["fork"])
        second = forks.start(tiny.command(run), folder / "second.log")
        code, errors = second.wait(), second.errors()
        if over or (code == 0 and first.ended(0)):  # the first was through by then
            first.wait()
            seconds["fork"] *= EARLY
            settle(work, folder, True)
            continue
        wrong = [] if code == REFUSED else [f"exit code {code}: {second.text()[-300:]}"]
        if len(errors) != 1 or str(run) not in errors[0]:
            wrong.append(f"{len(errors)} lines of error: {errors}")
        killed = trials.trials % 2 == 1 and not first.ended(0)
        if killed:
            first.kill()
        after = start(run).wait() if killed else first.wait()
        wrong += [f"the run ends with {after}"] if after else []
        wrong += differences(expected, run)
        settle(work, folder, trials.line(not wrong, code=code, killed=killed, told=errors[:1], wrong=wrong))


def main(options: argparse.Namespace) -> int:
    trials = Trials("second_trainer")
    with workplace(options.work) as work, Forks() as forks:
        tiny = make_tiny(work / "tiny")
        whole = unbroken(work, {"fork": starters(tiny, forks)["fork"]})
        prove(trials, work, tiny, forks, whole, options.n, options.seed)
    return trials.summary()


if __name__ == "__main__":
    sys.exit(main(parser(__doc__, 20).parse_args()))
