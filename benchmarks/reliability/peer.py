"""The kills, the stop and the full disk, survived or not by diffusers' train_text_to_image.py, which is run unmodified.

    python benchmarks/reliability/peer.py --script train_text_to_image.py --n 5

A tiny latent model, float32, 40 steps of 4 of 24 images, an average of the weights, a checkpoint every 5 steps, resumed
as its documentation has it (--resume_from_checkpoint=latest). "ok" means what it means for our own runs: the same bits
at the end as of the unbroken run, which it reproduces when it is not broken. Exit code 0: these failures are not ours.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from common import Result, Trials, content, make_images, make_models, newest, parser, workplace
from disk_full import mounts
from forks import Forked, Forks, Running, start_process, torchrun

HERE = Path(__file__).resolve().parent
STEPS, BATCH, INTERVAL = 40, 4, 5


def rewrite(images: Path, change: Callable[[list[Result]], object]) -> None:
    """Changes the captions of a folder."""
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    change(rows)
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Peer:
    """The script, and what it trains on."""

    def __init__(self, script: Path, work: Path, forks: Forks):
        self.script, self.work, self.forks = script, work, forks
        make_models(work)
        make_images(work / "images", damaged=False)
        # Its reader does not take one caption here and a list of them there.
        rewrite(work / "images", lambda rows: [row.update(text=f"number {place}") for place, row in enumerate(rows)])
        self.size = len(list((work / "images").glob("*.png")))

    def arguments(self, folder: Path, *more: str, images: Path | None = None) -> list[str]:
        settings = {
            "pretrained_model_name_or_path": self.work / "told",
            "train_data_dir": images or self.work / "images",
            "image_column": "image",
            "caption_column": "text",
            "resolution": 16,
            "train_batch_size": BATCH,
            "max_train_steps": STEPS,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "checkpointing_steps": INTERVAL,
            "cache_dir": folder / "datasets",
            "output_dir": folder / "run",
            "seed": 0,
        }
        options = [f"--{key}={value}" for key, value in settings.items()]
        return [str(folder / "notes"), str(self.script), *options, "--use_ema", "--center_crop", *more]

    def start(self, folder: Path, *more: str, images: Path | None = None) -> Forked:
        folder.mkdir(exist_ok=True)
        add = {"HF_HOME": str(self.work / "hub"), "HF_DATASETS_OFFLINE": "1"}
        line = self.arguments(folder, *more, images=images)
        return self.forks.start(line, folder / "log", module="peer_observe", folder=HERE, add=add)

    def resume(self, folder: Path) -> int:
        return self.start(folder, "--resume_from_checkpoint=latest").wait(300)


def notes(folder: Path, rank: int = 0) -> list[Result]:
    path = folder / f"notes-{rank}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def error(text: str) -> str:
    """The last line that tells of one."""
    return next((line[:200] for line in reversed(text.splitlines()) if "Error" in line), "")


def wait_for(running: Running, condition: Callable[[], bool]) -> None:
    while not condition():
        if running.ended(0.001):
            raise SystemExit(f"it ended with {running.wait()}: {running.text()[-3000:]}")


def weights(folder: Path) -> dict[str, str]:
    """The averaged weights that it puts out."""
    return {name: one for name, one in content(folder / "run").items() if name.startswith("unet/")}


def compared(peer: Peer, whole: Path, folder: Path, before: int, code: int) -> Result:
    """What a resumed run is like beside the unbroken one. before: steps of the run up to the checkpoint it took."""
    expected, all_ = notes(whole), notes(folder)
    done = len(all_)
    stopped = int((folder / "killed_at").read_text())
    after = all_[stopped:]
    pairs = list(zip(after, expected[before:], strict=False))
    kept = [image for record in [*all_[:before], *after] for image in record["images"]]
    times = [kept.count(image) for image in {image for record in expected for image in record["images"]}]
    return {
        "code": code,
        "same_end": code == 0 and weights(folder) == weights(whole),
        "steps_done": before + done - stopped,
        "batches_alike_after_resume": sum(one["given"] == other["given"] for one, other in pairs),
        "batches_after_resume": len(after),
        "an_image_seen_times": [min(times), max(times)],
    }


def killed_between_steps(peer: Peer, whole: Path, n: int, chance: random.Random) -> None:
    trials = Trials("peer_kill_between_steps")
    for number in range(n):
        folder = peer.work / f"between-{number}"
        at = chance.choice([step for step in range(INTERVAL + 1, STEPS - 1) if step % INTERVAL])
        running = peer.start(folder)
        wait_for(running, lambda folder=folder, at=at: len(notes(folder)) >= at)
        running.kill_family()
        (folder / "killed_at").write_text(str(len(notes(folder))))
        found = newest(folder / "run")
        result = compared(peer, whole, folder, found[0] if found else 0, peer.resume(folder))
        trials.line(result["same_end"], killed_after_step=at, **result)
    trials.summary()


def killed_in_save(peer: Peer, n: int, chance: random.Random) -> None:
    """Kills a little after the folder of a checkpoint appears: later by a time left to chance, up to that of a save."""
    trials = Trials("peer_kill_in_save")
    for number in range(n):
        folder, step = peer.work / f"in-save-{number}", INTERVAL * chance.randint(2, STEPS // INTERVAL - 2)
        path = folder / f"run/checkpoint-{step}"
        running = peer.start(folder)
        wait_for(running, lambda folder=folder, step=step: (folder / f"run/checkpoint-{step - INTERVAL}").exists())
        begun = time.monotonic()
        wait_for(running, lambda folder=folder, step=step: len(notes(folder)) > step - INTERVAL)
        saving = time.monotonic() - begun
        wait_for(running, path.exists)
        time.sleep(chance.uniform(0, 0.8) * saving)
        running.kill_family()
        files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        before = (folder / f"run/checkpoint-{step - INTERVAL}").exists()
        code = peer.resume(folder)
        last = error((folder / "log").read_text()) if code else ""
        facts = {"checkpoint": step, "files": len(files), "one_before_it": before, "resume_code": code, "told": last}
        trials.line(code == 0, **facts)
    trials.summary()


def stopped(peer: Peer, n: int, chance: random.Random) -> None:
    trials = Trials("peer_sigterm")
    for number in range(n):
        folder, at = peer.work / f"stopped-{number}", chance.choice([s for s in range(6, STEPS - 2) if s % INTERVAL])
        running = peer.start(folder)
        wait_for(running, lambda folder=folder, at=at: len(notes(folder)) >= at)
        running.signal(signal.SIGTERM)
        code, found, done = running.wait(60), newest(folder / "run"), len(notes(folder))
        saved = found[0] if found else 0
        trials.line(saved == done, code=code, steps_done=done, newest=saved, steps_lost=done - saved)
    trials.summary()


def fill(run: Path) -> None:
    """Takes all the space that there is."""
    with suppress(OSError), open(run / "filler", "ab", buffering=0) as file:
        while file.write(bytes(1 << 16)) == 1 << 16:
            pass


def disk_full(peer: Peer, whole: Path) -> None:
    """One checkpoint kept, and a disk that somebody else fills after the first: what is left."""
    trials = Trials("peer_disk_full")
    folder = peer.work / "full"
    run = folder / "run"
    run.mkdir(parents=True)
    size = 4 * sum(path.stat().st_size for path in (whole / f"run/checkpoint-{INTERVAL}").rglob("*"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", run], check=True)
    try:
        running = peer.start(folder, "--checkpoints_total_limit=1")
        wait_for(running, lambda: len(notes(folder)) > INTERVAL)
        while not running.ended(0.001):
            fill(run)
        code = running.wait()
        last = error(running.text())
        left = sorted(path.name for path in run.glob("checkpoint-*"))
        (run / "filler").unlink()
        resumed = peer.resume(folder) if left else -1
        trials.line(bool(left) and resumed == 0, code=code, told=last, checkpoints_left=left, resume_code=resumed)
    finally:
        subprocess.run(["umount", run], check=True)
    trials.summary()


def two_processes(peer: Peer) -> None:
    """How many steps have the same timesteps on both processes, which see other images. Without checkpoints: where one
    is saved, the main process draws numbers for it that the other does not."""
    trials = Trials("peer_two_processes")
    folder = peer.work / "two"
    folder.mkdir()
    line = ["-m", "peer_observe", *peer.arguments(folder, "--max_train_steps=20", "--checkpointing_steps=1000")]
    add = {"HF_HOME": str(peer.work / "hub"), "HF_DATASETS_OFFLINE": "1"}
    code = start_process(torchrun(2, *line), folder / "log", folder=HERE, add=add).wait(600)
    pairs = list(zip(notes(folder, 0), notes(folder, 1), strict=True))
    alike = sum(one["timesteps"] == other["timesteps"] for one, other in pairs)
    trials.line(code == 0 and alike == 0, code=code, steps=len(pairs), steps_of_the_same_timesteps=alike)
    trials.summary()


def bad_data(peer: Peer) -> None:
    """Data that a look before the first step would find: whether it is found, and named."""
    trials = Trials("peer_bad_data")

    faults: dict[str, Callable[[Path], object]] = {
        "a truncated image": lambda images: (images / "20.png").write_bytes((images / "20.png").read_bytes()[:300]),
        "a caption that is null": lambda images: rewrite(images, lambda found: found[20].update(text=None)),
        "a row less than images": lambda images: rewrite(images, lambda found: found.pop(20)),
    }
    for number, (name, change) in enumerate(faults.items()):
        folder = peer.work / f"bad-{number}"
        folder.mkdir()
        images = shutil.copytree(peer.work / "images", folder / "images")
        change(images)
        running = peer.start(folder, images=images)
        code, steps = running.wait(300), len(notes(folder))
        named = "20.png" in running.text()
        trials.line(named and steps == 0, fault=name, code=code, steps_done=steps, named=named)
    trials.summary()


def main(options: argparse.Namespace) -> int:
    mountable = mounts()
    if not options.script or not options.script.is_file():
        print("--script: diffusers' train_text_to_image.py is needed", file=sys.stderr)
        return 2
    chance = random.Random(options.seed)
    with workplace(options.work) as work, Forks() as forks:
        peer, whole = Peer(options.script.resolve(), work, forks), [work / f"whole-{number}" for number in range(2)]
        for folder in whole:
            if peer.start(folder).wait(600):
                raise SystemExit((folder / "log").read_text()[-3000:])
        same = weights(whole[0]) == weights(whole[1]) and notes(whole[0]) == notes(whole[1])
        trials = Trials("peer_unbroken")
        trials.line(same, steps_done=len(notes(whole[0])))
        trials.summary()
        parts: Sequence[tuple[str, Callable[[], None]]] = [
            ("between", lambda: killed_between_steps(peer, whole[0], options.n, chance)),
            ("in_save", lambda: killed_in_save(peer, options.n, chance)),
            ("sigterm", lambda: stopped(peer, options.n, chance)),
            ("disk", lambda: disk_full(peer, whole[0]) if mountable else None),
            ("two", lambda: two_processes(peer)),
            ("data", lambda: bad_data(peer)),
        ]
        for name, part in parts:
            if options.only in ("", name):
                part()
    return 0


if __name__ == "__main__":
    made = parser(__doc__, 5)
    made.add_argument("--script", type=Path, default=os.environ.get("PEER_SCRIPT"), help="train_text_to_image.py")
    made.add_argument("--only", default="", help="between, in_save, sigterm, disk, two or data")
    sys.exit(main(made.parse_args()))
