"""Another number of processes or micro-batches after a stop: the same images, captions, noise and noise levels.

    python benchmarks/reliability/other_process_counts.py --n 6

A trial is one run: begun by one process, stopped at a step left to chance, gone on with by two that torchrun starts,
stopped again, and finished by one; each time with a number of micro-batches left to chance. What every image of every
step was made of, as the network is given it, is compared with the run of one process that never stops, bit for bit, and
so is which images there are: none twice, none left out. Sums over other numbers of processes round otherwise, so
weights are not compared here (tests/test_processes.py does that in float64).
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from common import Tiny, Trials, make_tiny, metrics, parser, settle, workplace
from forks import Forks, Running, start_process, torchrun
from record_draws import PARTS

HERE = Path(__file__).resolve().parent
PATIENCE = 300.0  # seconds
MICRO_BATCHES = (1, 2, 4)

Draws = dict[str, list[str]]


def start(tiny: Tiny, run: Path, forks: Forks, processes: int, micro_batches: int, stop: int, turn: int) -> Running:
    """The command, with what is drawn noted beside the run folder in draws-TURN-RANK.jsonl."""
    command = tiny.command(run, f"--train.gradient_accumulation_steps={micro_batches}")
    line, log = [str(run.with_name(f"draws-{turn}")), str(stop), *command], run.with_name("log")
    if processes == 1:
        return forks.start(line, log, module="record_draws", folder=HERE)
    return start_process(torchrun(processes, "-m", "record_draws", *line), log, folder=HERE)


def drawn(folder: Path) -> tuple[Draws, list[str]]:
    """By image what it was made of, and the images that were trained on twice."""
    found: Draws = {}
    twice = []
    for file in sorted(folder.glob("draws-*.jsonl")):
        for line in file.read_text().splitlines():
            for index, parts in json.loads(line).items():
                twice += [index] if index in found else []
                found[index] = parts
    return found, twice


def compare(expected: Draws, folder: Path) -> list[str]:
    found, twice = drawn(folder)
    wrong = [f"image {index} of the run was trained on twice" for index in twice]
    wrong += [f"image {index} of the run: {'missing' if index in expected else 'too many'}"
              for index in sorted(expected.keys() ^ found.keys())]  # fmt: skip
    for index in expected.keys() & found.keys():
        pairs = zip(PARTS, expected[index], found[index], strict=True)
        wrong += [f"image {index} of the run: other {name}" for name, one, other in pairs if one != other]
    return wrong


def prove(
    trials: Trials, work: Path, tiny: Tiny, forks: Forks, n: int, seed: int, processes: Sequence[int] = (1, 2, 1)
) -> None:
    """`n` runs, each on these numbers of processes in turn."""
    chance, steps = random.Random(seed), tiny.settings["train"]["max_train_steps"]
    unbroken = work / "drawn-unbroken"
    unbroken.mkdir()
    running = start(tiny, unbroken / "run", forks, 1, 1, 0, 0)
    if running.wait():
        raise SystemExit(running.text())
    expected, _ = drawn(unbroken)
    for number in range(n):
        folder = work / f"drawn-{number}"
        folder.mkdir()
        stops = sorted(chance.sample(range(1, steps), len(processes) - 1))
        parts = [chance.choice(MICRO_BATCHES) for _ in processes]
        codes = [
            start(tiny, folder / "run", forks, count, parts[turn], stop, turn).wait(PATIENCE)
            for turn, (count, stop) in enumerate(zip(processes, [*stops, 0], strict=True))
        ]
        wrong = compare(expected, folder)
        if 0 in codes[:-1] or codes[-1]:
            wrong.append(f"exit codes {codes}: {(folder / 'log').read_text()[-500:]}")
        told = [line["step"] for line in metrics(folder / "run") if "loss" in line]
        wrong += [] if told == list(range(1, steps + 1)) else [f"steps {told}"]
        facts = {"processes": processes, "stopped_at": stops, "micro_batches": parts, "images": len(expected)}
        settle(work, folder, trials.line(not wrong, **facts, wrong=wrong[:10]))


def main(options: argparse.Namespace) -> int:
    trials = Trials("other_process_counts")
    with workplace(options.work) as work, Forks() as forks:
        prove(trials, work, make_tiny(work / "tiny", steps=24), forks, options.n, options.seed)
    return trials.summary()


if __name__ == "__main__":
    sys.exit(main(parser(__doc__, 6).parse_args()))
