"""A sheet of one prompt and seed: a row for each solver, a column for each number of steps.

    python benchmarks/solver_strip.py runs/quickstart/model "a photo of a sneaker" docs/solvers.png

The labels name the solvers; the steps of the columns are STEPS.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffusion_unet.images import grid, save_png  # noqa: E402
from diffusion_unet.model import DiffusionModel  # noqa: E402
from diffusion_unet.solver_names import NAMES  # noqa: E402
from sampling import sample  # noqa: E402

STEPS = (2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("prompt")
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    options = parser.parse_args()
    model = DiffusionModel.load(options.model)
    drawn = {"seeds": [options.seed], "guidance_scale": options.guidance_scale, "model_hash": model.fingerprint()}
    pictures = [
        sample(model, options.prompt, solver=solver, steps=steps, **drawn)[0] for solver in NAMES for steps in STEPS
    ]
    save_png(options.out, grid(pictures, NAMES, len(STEPS)), {})


if __name__ == "__main__":
    main()
