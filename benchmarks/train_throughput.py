"""Images a second and memory of fine-tuning a small latent model, beside diffusers' own text-to-image script.

    python benchmarks/train_throughput.py --script diffusers/examples/text_to_image/train_text_to_image.py

The script runs as it is, but for a stand-in for torchvision.transforms (pillow_transforms.py) where torchvision is not
installed. Both sides train all weights of the same U-Net from the same model folder on the same image folder: one
process, float32, AdamW, noise levels uniform in t, gradients clipped, an average of the weights, tensorboard, no
gradient checkpointing. They take turns, round by round. Measured is the time from one optimizer step to another, after
the first ones; memory is the most that was resident until the last step. Prints a table (Markdown); --json keeps all.

The model is Stable Diffusion 1's in small, its autoencoder's share of the arithmetic included: it encodes an image for
half of what training the U-Net on it takes (there 0.46).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
PIXELS = 128
LENGTH, WIDTH = 77, 128  # of the encoded captions, tokens and channels
COLOURS = ("red", "green", "blue", "orange", "purple", "grey", "brown", "olive")
SHAPES = ("circle", "square", "triangle", "bar")
THEIRS, OURS, CACHED = "train_text_to_image.py", "encoders in every step", "with caches"

Result = dict[str, Any]


def make_images(folder: Path, count: int) -> Path:
    """JPEGs of 160 x 128 pixels, a shape on a noisy ground, and their captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    rows = []
    for number in range(count):
        colour, ground, shape = chance.choice(COLOURS), chance.choice(COLOURS), chance.choice(SHAPES)
        image = Image.blend(
            Image.effect_noise((160, PIXELS), 90).convert("RGB"), Image.new("RGB", (160, PIXELS), ground), 0.6
        )
        left, top = chance.randint(0, 90), chance.randint(0, 60)
        box = (left, top, left + 60, top + (20 if shape == "bar" else 60))
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "triangle":
            draw.polygon([(left, top + 60), (left + 60, top + 60), (left + 30, top)], fill=colour)
        else:
            draw.rectangle(box, fill=colour)
        image.save(folder / f"{number:04d}.jpg", quality=90)
        rows.append(json.dumps({"file_name": f"{number:04d}.jpg", "text": f"a {colour} {shape} on {ground} ground"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def make_model(folder: Path, images: Path) -> Path:
    """A Stable Diffusion model folder, small, its weights random."""
    from diffusers import AutoencoderKL

    from diffusion_unet.codec import LatentCodec
    from diffusion_unet.conditioning import new_text_encoder, train_tokenizer
    from diffusion_unet.config import UNetConfig
    from diffusion_unet.model import DiffusionModel
    from diffusion_unet.schedule import NoiseSchedule
    from diffusion_unet.unet import UNet

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        sample_size=PIXELS,
    )
    unet = {
        "sample_size": PIXELS // 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [64, 128, 128, 128],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": [2, 4, 4, 4],
    }
    captions = [json.loads(line)["text"] for line in (images / "metadata.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(captions, 1024, LENGTH)
    text = new_text_encoder(tokenizer, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4)
    model = DiffusionModel(UNet(UNetConfig.from_diffusers(unet)), NoiseSchedule.scaled_linear(), text, LatentCodec(vae))
    return model.save(folder)


def their_command(script: Path, work: Path, out: Path, steps: int, batch: int, workers: int) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": work / "model",
        "train_data_dir": work / "images",
        "image_column": "image",
        "caption_column": "text",
        "resolution": PIXELS,
        "train_batch_size": batch,
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "dataloader_num_workers": workers,
        "checkpointing_steps": 10**6,
        "cache_dir": work / "datasets",
        "output_dir": out,
        "seed": 0,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    return ["--stand-in", str(script), *options, "--random_flip", "--use_ema", "--foreach_ema"]


def our_command(work: Path, out: Path, steps: int, batch: int, cached: bool) -> list[str]:
    settings = {
        "model": {"pretrained": str(work / "model")},
        "data": {
            "train_data_dir": str(work / "images"),
            "resolution": PIXELS,
            "random_flip": True,
            "caption_dropout": 0.0,
            "cache_latents": cached,
            "cache_text": cached,
        },
        "objective": {"noise_distribution": "uniform"},
        "optimizer": {"learning_rate": 1e-4, "lr_scheduler": "constant"},
        "train": {
            "output_dir": str(out),
            "max_train_steps": steps,
            "train_batch_size": batch,
            "checkpointing_steps": 10**6,
            "ema": ["0.9999"],
            "report_to": ["tensorboard"],
        },
    }
    out.mkdir()
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    return ["-m", "diffusion_unet", "train", str(out / "config.yaml")]


def run(command: Sequence[str], work: Path, name: str, batch: int, warm_up: int) -> Result:
    """One training in a process of its own: images a second by the clock and by processor time, and memory."""
    found = work / f"{name}.json"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hub"), "DO_NOT_TRACK": "1"}
    environment = {**os.environ, **offline}
    with open(work / f"{name}.log", "w") as log:
        line = [sys.executable, str(HERE / "observe.py"), str(found), *command]
        code = subprocess.run(line, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{name} failed:\n{(work / f'{name}.log').read_text()[-3000:]}")
    noted = json.loads(found.read_text())
    steps = noted["steps"]
    first, last = steps[warm_up - 1], steps[-1]
    images = batch * (len(steps) - warm_up)
    return {
        "images_per_second": images / (last[0] - first[0]),
        "images_per_processor_second": images / (last[1] - first[1]),
        "memory": last[2],
        "weights": noted["weights"],
    }


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    make_model(work / "model", make_images(work / "images", options.images))
    size = (options.steps, options.batch)

    def take(name: str, number: str, workers: int = 0) -> Result:
        folder = work / f"run-{number}"
        if name == THEIRS:
            command = their_command(options.script.resolve(), work, folder, *size, workers)
        else:
            command = our_command(work, folder, *size, name == CACHED)
        result = run(command, work, f"run-{number}", options.batch, options.warm_up)
        print(f"{name:24} {result['images_per_second']:7.2f} images/s", file=sys.stderr, flush=True)
        return result

    trials = {workers: take(THEIRS, f"trial-{workers}", workers) for workers in options.workers}
    workers = max(trials, key=lambda number: trials[number]["images_per_second"])
    results: dict[str, list[Result]] = {THEIRS: [], OURS: [], CACHED: []}
    for number in range(options.rounds):
        for place, name in enumerate(results):
            results[name].append(take(name, f"{number}-{place}", workers))
    trained = {result["weights"] for found in results.values() for result in found}
    if len(trained) > 1:
        raise SystemExit(f"not the same network was trained on both sides: {sorted(trained)} weights")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "accelerate", "transformers")}
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions,
        "settings": {key: value for key, value in vars(options).items() if not isinstance(value, Path)},
        "workers": workers,
        "trials": trials,
        "results": results,
    }


def ratios(results: dict[str, list[Result]], name: str, key: str) -> list[float]:
    """Ours to theirs, round by round."""
    return [mine[key] / other[key] for mine, other in zip(results[name], results[THEIRS], strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(report: dict[str, Any]) -> str:
    """Markdown: medians over the rounds, and the least and most."""
    results, settings = report["results"], report["settings"]
    lines = [
        "| | images/s | of theirs, by the clock | of theirs, by processor time | peak memory, MB | of theirs |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        label = name if name == THEIRS else f"diffusion-unet, {name}"
        cells = [label, spread([result["images_per_second"] for result in found])]
        for key in ("images_per_second", "images_per_processor_second"):
            cells.append(f"{spread(ratios(results, name, key))}")
        cells.append(spread([result["memory"] / 2**20 for result in found], 0))
        cells.append(f"{statistics.median(ratios(results, name, 'memory')):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    steps, versions = settings["steps"] - settings["warm_up"], report["versions"]
    lines += [
        "",
        f"Medians (least to most) of {settings['rounds']} rounds of {steps} steps, after {settings['warm_up']} others,"
        f" of {settings['batch']} images of {PIXELS} px; {report['machine']['threads']} threads; their loader with"
        f" {report['workers']} workers, the fastest of {settings['workers']}; torch {versions['torch']}, diffusers"
        f" {versions['diffusers']}. `{THEIRS}` as published, with a Pillow-based stand-in for torchvision.transforms.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="diffusers' train_text_to_image.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=10, help="steps that are not measured")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="of their loader; the fastest is taken"
    )
    parser.add_argument("--json", type=Path, help="file for every measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        report = measure(options, Path(work))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
