"""What the scripts of this folder share: their options and lines, and a run that takes two seconds.

Each script prints a line of JSON for each trial, {"test": ..., "trial": ..., ..., "ok": true}, and a last one
{"test": ..., "summary": true, "n": ..., "failures": ...}; it exits with 1 where a trial failed.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from forks import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT))

from diffusion_unet.checkpoint import read_safetensors, write_safetensors

Result = dict[str, Any]

STEPS = 40
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (245, 245, 245)}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


# ---- options and lines


def parser(doc: str | None, n: int | None) -> argparse.ArgumentParser:
    """The options that all scripts have. n: how many trials the whole proof takes, None where it finds them itself."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--n", type=int, default=n, help=f"trials ({'all' if n is None else n})")
    made.add_argument("--seed", type=int, default=0, help="of all that is left to chance (0)")
    made.add_argument("--work", type=Path, help="folder for the runs, kept; otherwise a temporary one")
    return made


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """The folder for the runs. Without one given it is removed, unless something failed."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="reliability-")).resolve()
    yield made
    if not any(made.glob("failed-*")):
        shutil.rmtree(made)


@dataclass
class Trials:
    """The lines of one test."""

    test: str
    trials: int = 0
    failures: int = 0
    lines: list[Result] = field(default_factory=list)

    def line(self, ok: bool, **facts: Any) -> bool:
        """Prints the line of one trial, and returns `ok`."""
        self._print({"test": self.test, "trial": self.trials, **facts, "ok": ok})
        self.trials += 1
        self.failures += not ok
        return ok

    def summary(self, **facts: Any) -> int:
        """Prints the last line, and returns the exit code."""
        self._print({"test": self.test, "summary": True, "n": self.trials, "failures": self.failures, **facts})
        return int(self.failures > 0)

    def _print(self, line: Result) -> None:
        self.lines.append(line)
        print(json.dumps(line), flush=True)


def skipped(test: str, why: str) -> int:
    """What is printed where a test cannot be made on this machine."""
    print(json.dumps({"test": test, "summary": True, "n": 0, "failures": 0, "skipped": why}), flush=True)
    return 0


def settle(work: Path, trial: Path, ok: bool) -> None:
    """Removes the folder of a trial; that of a failed one is kept as failed-NAME."""
    if ok:
        shutil.rmtree(trial)
    else:
        trial.rename(work / f"failed-{trial.name}")


def machine() -> Result:
    """What the trials ran on."""
    names = ("torch", "diffusers", "accelerate", "transformers", "safetensors")
    with open("/proc/cpuinfo") as file:
        models = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": ", ".join(sorted(models)) or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


# ---- a tiny run: new U-Net in the latents of an autoencoder, captions of a frozen text encoder, both cached


@dataclass(frozen=True)
class Tiny:
    """The data, the models and the settings of the runs under `folder`."""

    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def settings(self) -> Result:
        found: Result = yaml.safe_load((self.folder / "config.yaml").read_text())
        return found

    def command(self, run: Path, *overrides: str) -> list[str]:
        """What `python -m diffusion_unet` is given."""
        return ["train", str(self.folder / "config.yaml"), f"--train.output_dir={run}", *overrides]


def make_tiny(folder: Path, steps: int = STEPS, **train: Any) -> Tiny:
    """Pictures (one of them damaged), models and config.yaml; `train` are settings of that section."""
    folder.mkdir(parents=True)
    make_images(folder / "images")
    make_models(folder)
    settings = {
        "model": {
            "unet": UNET,
            "vae": str(folder / "vae"),
            "pretrained_text_encoder": str(folder / "told"),
            "text_encoder": None,
            "schedule": {"kind": "scaled_linear", "prediction_type": "v_prediction"},
        },
        "data": {
            "train_data_dir": str(folder / "images"),
            "resolution": 16,
            "random_flip": True,
            "caption_dropout": 0.2,
            "held_out": 4,
            "max_bad_fraction": 0.1,
            "cache_latents": True,
            "cache_crops": 2,
            "cache_text": True,
        },
        "optimizer": {"learning_rate": 1e-3, "lr_warmup_steps": 5, "lr_scheduler": "cosine"},
        "train": {
            "max_train_steps": steps,
            "train_batch_size": 8,
            "checkpointing_steps": 5,
            "ema": ["0.99"],
            **train,
        },
        "validation": {
            "validation_prompts": ["a red square"],
            "num_validation_images": 2,
            "validation_steps": 20,
            "num_inference_steps": 6,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return Tiny(folder)


def make_images(folder: Path, count: int = 24, *, damaged: bool = True) -> Path:
    """Squares of one colour on a ground of noise, 20 x 16 pixels, of one or two captions each. damaged: the last is
    cut."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    rows = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        image = Image.frombytes("RGB", (20, 16), chance.randbytes(20 * 16 * 3))
        image.paste(colour, (number % 5, number % 3, number % 5 + 9, number % 3 + 8))
        image.save(folder / f"{number:02d}.png")
        captions = [f"a {name} square", name] if number % 2 else f"a {name} square"
        rows.append(json.dumps({"file_name": f"{number:02d}.png", "text": captions}))
    last = folder / f"{count - 1:02d}.png"
    last.write_bytes(last.read_bytes()[: 200 if damaged else None])
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def make_models(folder: Path) -> None:
    """An autoencoder (`vae`), and a model folder for its text encoder (`told`), with random weights."""
    from diffusers import AutoencoderKL

    from diffusion_unet.codec import LatentCodec
    from diffusion_unet.conditioning import new_text_encoder, train_tokenizer
    from diffusion_unet.config import UNetConfig
    from diffusion_unet.model import DiffusionModel
    from diffusion_unet.schedule import NoiseSchedule
    from diffusion_unet.unet import UNet

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        sample_size=16,
    )
    vae.save_pretrained(folder / "vae")
    tokenizer = train_tokenizer([f"a {name} square" for name in COLOURS], 560, 12)
    text = new_text_encoder(tokenizer, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    unet = UNet(UNetConfig.from_diffusers({**UNET, "sample_size": 8}))
    DiffusionModel(unet, NoiseSchedule.scaled_linear(), text, LatentCodec(vae)).save(folder / "told")


# ---- what became of a run


def newest(run: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint under its final name."""
    found = [
        (int(step), path)
        for path in run.glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdigit()
    ]
    return max(found, default=None)


def damage(checkpoint: Path) -> list[str]:
    """What of a checkpoint is not as its manifest says; read here without the code that wrote it."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"manifest.json: {error!r}"]
    there = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    wrong = [f"{name}: is {'there' if name in there else 'missing'}" for name in sorted(there ^ files.keys())]
    for name in sorted(there & files.keys()):
        content = (checkpoint / name).read_bytes()
        if len(content) != files[name]["bytes"] or hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
            wrong.append(f"{name}: is not as in the manifest")
    return wrong


def metrics(run: Path) -> list[Result]:
    """The lines of metrics.jsonl, without times."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def content(run: Path) -> dict[str, str]:
    """A digest of every file of a run folder, but for what is different in each run: times, and its own name."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name == ".lock" or (path.name == "manifest.json" and name.startswith("checkpoint-")):
            continue
        data = path.read_bytes()
        if path.name == "state.json":
            state = json.loads(data)
            state.pop("seconds", None)
            state.get("config", {}).get("train", {}).pop("output_dir", None)
            data = json.dumps(state, sort_keys=True).encode()
        elif name == "metrics.jsonl":
            data = json.dumps(metrics(run)).encode()
        elif path.suffix == ".safetensors":
            data = in_order(data)
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def newest_only(files: dict[str, str]) -> dict[str, str]:
    """The files of a run folder without those of checkpoints before the newest."""
    steps = {name: int(name.partition("/")[0].removeprefix("checkpoint-")) for name in files if "checkpoint-" in name}
    return {name: digest for name, digest in files.items() if steps.get(name) in (None, max(steps.values()))}


def in_order(data: bytes) -> bytes:
    """The bytes of a safetensors file with its header sorted: in which order that is written is left to chance."""
    size = int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode() + data[8 + size :]


def differences(expected: dict[str, str], run: Path, *, older: bool = True) -> list[str]:
    """What of a finished run is not as in the unbroken one, and what of its newest checkpoint is not whole.

    older: checkpoints before the newest are compared too; one that was told to stop has saved at other steps."""
    given = content(run)
    if not older:
        given, expected = newest_only(given), newest_only(expected)
    wrong = [f"{name}: {'missing' if name not in given else 'left behind'}" for name in expected.keys() ^ given.keys()]
    wrong += [f"{name}: differs" for name in expected.keys() & given.keys() if expected[name] != given[name]]
    found = newest(run)
    return sorted(wrong) + (damage(found[1]) if found else ["no checkpoint"])


def edit_tensors(path: Path, change: Any) -> None:
    """Has `change` alter the tensors of a file, a mapping by name, in place."""
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    change(tensors)
    write_safetensors(path, tensors)


def write_manifest(checkpoint: Path) -> None:
    """Makes the manifest fit whatever the files of a checkpoint hold by now."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    others = sorted(file for file in checkpoint.iterdir() if file != path)
    manifest["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in others
    }
    path.write_text(json.dumps(manifest))
