"""How many images the quickstart could train on in its time, at each resolution.

    python benchmarks/quickstart_resolution.py

Trains the quickstart's own configuration for a few steps at every resolution, in turn, three rounds, and prints the
median of images a second, and how many images that makes in the seconds given (default 200).
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from diffusion_unet.cli import CONFIGS
from training import train
from training.config import load_config

RESOLUTIONS = (16, 20, 24, 28, 32)
STEPS, SKIPPED, ROUNDS = 24, 8, 3  # the first steps are slower: memory is allocated


def images_per_second(resolution: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"--train.output_dir={folder}",
            f"--train.max_train_steps={STEPS}",
            f"--data.resolution={resolution}",
            "--data.max_train_samples=1000",
            "--validation.validation_prompts=[]",
        ]
        config = load_config(CONFIGS / "quickstart.yaml", settings)
        train(config, progress=False)
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        seconds = [line["seconds"] for line in lines if "loss" in line]
    return (STEPS - SKIPPED) * config.train.train_batch_size / (seconds[-1] - seconds[SKIPPED - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200)
    seconds = parser.parse_args().seconds
    rates: dict[int, list[float]] = {resolution: [] for resolution in RESOLUTIONS}
    for _ in range(ROUNDS):
        for resolution in RESOLUTIONS:
            rates[resolution].append(images_per_second(resolution))
    for resolution, found in rates.items():
        rate = statistics.median(found)
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"{resolution} px: {rate:5.1f} images/s ({spread}), {rate * seconds:7,.0f} images in {seconds:g} s")


if __name__ == "__main__":
    main()
