"""Runs diffusers' train_text_to_image.py as it is, and notes what each of its optimizer steps is made of.

    python -m peer_observe OUT SCRIPT ARGUMENTS...

OUT-RANK.jsonl: a line for each optimizer step, with a digest of each of its images' pixels, its timesteps, and a digest
of all that the U-Net is given. `torchvision.transforms` is the stand-in of ../pillow_transforms.py.
"""

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.append(str(Path(__file__).resolve().parents[1]))

from observe import stand_in


def digest(*tensors: Tensor) -> str:
    content = b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> None:
    out, *arguments = sys.argv[1:]
    file = Path(f"{out}-{os.environ.get('RANK', '0')}.jsonl")
    torch.set_num_threads(1)
    stand_in()
    record: dict[str, Any] = {}

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        kind = type(module).__name__
        if kind == "Encoder":  # of the autoencoder
            record["images"] = [digest(row) for row in given[0]]
        if kind == "UNet2DConditionModel":
            record["timesteps"] = given[1].tolist()
            record["given"] = digest(*given[:3])

    def step(*_: Any) -> None:
        with open(file, "a") as lines:
            lines.write(json.dumps(record) + "\n")

    register_module_forward_pre_hook(look)
    register_optimizer_step_post_hook(step)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
