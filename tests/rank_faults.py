"""A run of two processes, of which one is killed or stopped, for test_ranks.py.

    python rank_faults.py FOLDER FAULT ...

FOLDER/config.yaml holds the settings. FAULT is SIGNAL-RANK-PLACE, as in KILL-1-step3 or STOP-0-preview; the n-th is for
what torchrun starts the n-th time, and befalls the run FOLDER/broken. Without one left, FOLDER/unbroken is trained too.
In FOLDER are noted, by the clock of the machine: begun-N-RANK, when a process began, with its number, and fault-N.

The processes are started, watched and started again by torchrun's own agent; they are forks of this one, which spares
each of them the seconds in which torch is read.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffusion_unet.model import DiffusionModel
from training.config import load_config
from training.loop import Trainer, train

# What a run imports on the way.
PRELOADED = (
    "diffusers.image_processor",
    "diffusers.optimization",
    "einops._torch_specific",
    "torch._dynamo",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
LONG = 120  # seconds of a preview, which nothing but the end of the process cuts short


def process(folder: Path, faults: list[str]) -> None:
    attempt, own = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    (folder / f"begun-{attempt}-{own}").write_text(f"{time.monotonic()} {os.getpid()}")
    kind, rank, place = (faults[int(attempt)] if int(attempt) < len(faults) else "--").split("-")
    take = Trainer.step

    def strike() -> None:
        pid = int((folder / f"begun-{attempt}-{rank}").read_text().split()[1])
        (folder / f"fault-{attempt}").write_text(str(time.monotonic()))
        os.kill(pid, getattr(signal, f"SIG{kind}"))

    def step(self: Trainer, *arguments: Any) -> dict[str, float]:
        record = take(self, *arguments)
        if rank == own and place == f"step{self.steps_done}":
            strike()
        return record

    def preview(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        if place == "preview":
            strike()
            time.sleep(LONG)
        return [Image.new("RGB", (8, 8))] * (len(prompts) * len(seeds))

    with mock.patch.object(Trainer, "step", step):
        for run in ("broken", "unbroken"):
            config = load_config(folder / "config.yaml", [f"--train.output_dir={folder / run}"])
            train(config, preview=preview, progress=False)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    faults = sys.argv[2:]
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max(0, len(faults) - 1),
        start_method="fork",
    )
    elastic_launch(launch, process)(Path(sys.argv[1]), faults)
