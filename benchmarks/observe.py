"""Runs a training program as it is, and notes the time and the memory after each of its optimizer steps.

    python benchmarks/observe.py OUT.json [--stand-in] (SCRIPT.py | -m MODULE) ARGUMENTS...

OUT.json: per step the seconds on the clock, the seconds of processor time, and the largest resident memory so far in
bytes; the number of trained weights. --stand-in: `torchvision.transforms` is pillow_transforms.py.
"""

import importlib.machinery
import importlib.util
import json
import resource
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def stand_in() -> None:
    """Puts pillow_transforms.py where `from torchvision import transforms` finds it.

    Libraries that would take more of torchvision look for it first, and must have found that it is not there."""
    if importlib.util.find_spec("torchvision") is not None:
        raise SystemExit("torchvision is installed: leave out --stand-in")
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available()
    import pillow_transforms

    package = types.ModuleType("torchvision")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", loader=None)
    package.transforms = pillow_transforms  # type: ignore[attr-defined]
    sys.modules["torchvision"] = package
    sys.modules["torchvision.transforms"] = pillow_transforms


def main() -> None:
    out, *arguments = sys.argv[1:]
    if arguments[0] == "--stand-in":
        stand_in()
        arguments.pop(0)
    steps: list[tuple[float, float, int]] = []
    weights = 0

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal weights
        weights = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        steps.append((time.perf_counter(), time.process_time(), memory))

    register_optimizer_step_post_hook(note)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        Path(out).write_text(json.dumps({"steps": steps, "weights": weights}))


if __name__ == "__main__":
    main()
