"""A folder of coloured squares and the settings of a run on it that takes seconds."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from training import checkpoint
from training.config import Config, load_config

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (245, 245, 245)}

UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def image_folder(folder: Path, count: int = 12) -> Path:
    """Squares of one colour on black, 14 x 10 pixels, with metadata.jsonl of one or two captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        image = Image.new("RGB", (14, 10))
        image.paste(colour, (number % 5, number % 3, number % 5 + 7, number % 3 + 6))
        image.save(folder / f"{number}.png")
        captions = [f"a {name} square", f"{name}"] if number % 2 else f"a {name} square"
        rows.append(json.dumps({"file_name": f"{number}.png", "text": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def tiny_config(folder: Path, data: Path | str, *overrides: str, **train: Any) -> Config:
    """A run in `folder`/run; `train` are settings of that section."""
    settings = {
        "model": {
            "unet": UNET,
            "text_encoder": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            "tokenizer": {"vocab_size": 560, "max_length": 8},
            "schedule": {"kind": "cosine", "prediction_type": "v_prediction"},
        },
        "data": {"train_data_dir": str(data), "resolution": 8, "random_flip": True, "caption_dropout": 0.2},
        "optimizer": {"learning_rate": 1e-3, "lr_warmup_steps": 2, "lr_scheduler": "cosine"},
        "train": {
            "output_dir": str(folder / "run"),
            "max_train_steps": 6,
            "train_batch_size": 4,
            "checkpointing_steps": 100,
            "ema": ["0.9"],
            **train,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / "config.yaml", overrides)


def final(config: Config) -> checkpoint.Checkpoint:
    """The newest checkpoint of the run."""
    found = checkpoint.load(Path(config.train.output_dir))
    assert found is not None
    return found


def assert_same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint, tolerance: float = 0.0) -> None:
    """The same tensors, bit for bit unless a tolerance is given."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, part in one.tensors.items():
        assert part.keys() == other.tensors[name].keys()
        for key, tensor in part.items():
            if tolerance:
                torch.testing.assert_close(tensor, other.tensors[name][key], rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(tensor, other.tensors[name][key]), f"{name} {key}"


def metrics(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
