"""A short run by the real command under strace: everything that it writes, and what comes of it when a call goes wrong.

Not checkpoints alone: the model as it begins, caches, the index, the list of bad samples, metrics and pictures.
"""

from pathlib import Path

from common import Tiny, content, damage, differences, make_tiny, metrics, newest
from forks import Forked, Forks
from tracing import Call, Trace

INTERVAL = 2  # steps from one checkpoint to the next


class ShortRun:
    """Six steps, three checkpoints of which the first is removed, two pictures."""

    def __init__(self, work: Path, forks: Forks):
        self.work, self.forks = work, forks
        self.tiny: Tiny = make_tiny(work / "short", steps=6, checkpointing_steps=INTERVAL)
        self.options = ["--validation.validation_steps=3"]
        begun, trace = self.traced(work / "short-whole")
        if begun.wait():
            raise SystemExit(begun.text())
        run = work / "short-whole/run"
        self.expected = content(run)
        # What fails by itself, a folder that is there already, is not something that a full disk would hit.
        self.points = [call for call in trace.end() if call.below(run) and not call.failed]

    def start(self, folder: Path, *, gate: bool = False) -> Forked:
        """The command, for the run folder FOLDER/run."""
        return self.forks.start(self.tiny.command(folder / "run", *self.options), folder / "log", gate=gate)

    def traced(self, folder: Path, inject: str | None = None) -> tuple[Forked, Trace]:
        folder.mkdir()
        process = self.start(folder, gate=True)
        return process, Trace(process, folder / "trace", inject)

    def finish(self, folder: Path) -> list[str]:
        """Runs the same command to the end; what is not as in the unbroken run."""
        again = self.start(folder)
        if code := again.wait():
            return [f"the command run again ends with {code}: {again.text()[-500:]}"]
        return differences(self.expected, folder / "run")

    def tried(self, name: str, inject: str) -> tuple[Path, Forked, list[Call]]:
        """Runs until something goes wrong: the folder, the process that has ended, and its calls."""
        folder = self.work / name
        process, trace = self.traced(folder, inject)
        process.wait()
        return folder, process, trace.end()

    def left_behind(self, run: Path) -> list[str]:
        """Files that a finished run does not have, checkpoints that are not whole, and older ones that are lost."""
        there = [path for path in run.rglob("*") if not path.is_dir()] if run.exists() else []
        names = [str(path.relative_to(run)) for path in there]
        known = {*self.expected, ".lock"}
        wrong = [f"{name}: left behind" for name in names if name not in known and not name.startswith("checkpoint-")]
        wrong += [f"{path.name}: {what}" for path in run.glob("checkpoint-*") for what in damage(path)]
        lines, found = metrics(run), newest(run)
        last = lines[-1]["step"] if lines else 0
        if (found[0] if found else 0) < (last - 1) // INTERVAL * INTERVAL:
            wrong.append(f"step {last} was done, and {found[1].name if found else 'no checkpoint'} is the newest")
        return wrong


def kind_of(call: Call, run: Path) -> str:
    """What a call writes, in a word or two."""
    paths = [Path(path).relative_to(run) for path in call.paths if Path(path).is_relative_to(run)]
    if any(str(path).startswith((".unfinished-old", ".replaced")) for path in paths):
        return "removal"
    path = paths[0]
    first = path.parts[0] if path.parts else ""
    if first.startswith((".unfinished", "checkpoint-")):
        return "checkpoint"
    if first.startswith((".base", "base")):
        return "model before the first step"
    for part, kind in (("index.jsonl", "index"), ("quarantine", "bad samples")):
        if part in path.name:
            return kind
    for part, kind in (("cache", "cache"), ("previews", "picture"), ("metrics", "metrics")):
        if part in first:
            return kind
    return "run folder"
