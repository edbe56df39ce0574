"""Runs the command line as it is, and notes what each image of each optimizer step is made of.

    python -m record_draws OUT STOP VERB ...

OUT-RANK.jsonl: a line for each optimizer step, {global image index: [sha256 of its pixels, of what it is told, of its
noise, of its noise level]}. After step STOP (0: never) every process sends itself SIGTERM.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch

PARTS = {
    "pixels": ("images", "moments", "latent_noise"),
    "told": ("ids", "context", "pooled"),
    "noise": ("noise",),
    "level": ("sigma", "weight"),
}


def digest(batch: Any, place: int, names: tuple[str, ...]) -> str:
    """Of one image's rows of these tensors of a batch."""
    found = [getattr(batch, name) for name in names]
    rows = [tensor[place].contiguous() for tensor in found if tensor is not None]
    return hashlib.sha256(b"".join(row.numpy().tobytes() for row in rows)).hexdigest()


def main() -> None:
    from training.batches import Batch
    from training.loop import Trainer

    out, stop, *arguments = sys.argv[1:]
    file = Path(f"{out}-{os.environ.get('RANK', '0')}.jsonl")
    part, take = Batch.part, Trainer.step
    seen: dict[int, list[str]] = {}

    def noted(self: Batch, number: int, parts: int) -> Batch:
        """A micro-batch, which is what the network is given."""
        made = part(self, number, parts)
        for place, index in enumerate(made.indices):
            seen[index] = [digest(made, place, names) for names in PARTS.values()]
        return made

    def step(self: Trainer, batch: Batch) -> dict[str, float]:
        seen.clear()
        record = take(self, batch)
        with open(file, "a") as lines:
            lines.write(json.dumps(seen) + "\n")
        if self.steps_done == int(stop):
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    Batch.part, Trainer.step = noted, step  # type: ignore[method-assign]
    torch.set_num_threads(1)
    sys.argv = ["diffusion_unet", *arguments]
    runpy.run_module("diffusion_unet", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
