"""A run made into a model folder that diffusers loads, with a card that tells how it came about."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffusion_unet.codec import PixelCodec
from diffusion_unet.errors import InputError, SaveError
from diffusion_unet.model import DiffusionModel

from . import checkpoint
from .config import Config, config_from_dict, to_dict
from .data import EMBEDDED
from .loop import BASE, METRICS, PREVIEWS, step_of
from .network import Network, trains_text

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RAW = "none"
GRID = "grid.png"
RECENT = 100  # steps over which the card's loss is averaged


def export(
    run: Path | str, out: Path | str, *, ema: str | None = None, dtype: str | None = None, variant: str | None = None
) -> Path:
    """Writes the newest whole checkpoint of a run as a model folder, reads it back, compares, and returns it.

    ema: name of the averaged weights; None takes the run's own where it has any, "none" the weights themselves.
    dtype: fp32 (None), fp16 or bf16; variant: a word in the names of the weight files, such as "fp16".
    Raises InputError for a run or a name that is not there, SaveError where the folder cannot be written."""
    run, out = Path(run), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not known; it is one of {', '.join(DTYPES)}")
    if not run.is_dir():
        raise InputError(f"{run}: there is no such run folder")
    found = checkpoint.load(run)
    if found is None:
        raise InputError(f"{run}: no checkpoint there; train first, or give the train.output_dir of a run")
    config = config_from_dict(found.state.get("config", {}), str(found.path))
    model = DiffusionModel.load(config.model.pretrained or run / BASE, dtype=torch.float32)
    if config.model.pretrained and model.fingerprint() != found.state.get("pretrained"):
        raise InputError(f"{config.model.pretrained}: not the model that {run} was tuned from; put that one back")
    name = _weights(found, ema)
    _put_in(model, found, config, name)
    step = found.state["step"]
    picture = _preview(run / PREVIEWS, step)
    files = {GRID: picture.read_bytes()} if picture else {}
    loss = _recent_loss(run / METRICS, step)
    text = card(config, found, name, model, out.resolve().name, loss, with_grid=bool(files))
    as_dtype = DTYPES[dtype or "fp32"]
    model.save(out, card=text, files=files, variant=variant, dtype=as_dtype)
    _compare(model, DiffusionModel.load(out, variant=variant), as_dtype, out)
    return out


def _weights(found: checkpoint.Checkpoint, ema: str | None) -> str:
    """Which file of the checkpoint holds the weights that are asked for."""
    if ema == RAW or (ema is None and not found.averages):
        return "model"
    if ema is None:
        return f"ema_{found.averages[0]}"
    if ema not in found.averages:
        known = ", ".join([*found.averages, RAW])
        raise InputError(f"{found.path}: no averaged weights named {ema!r}; there are {known}")
    return f"ema_{ema}"


def _put_in(model: DiffusionModel, found: checkpoint.Checkpoint, config: Config, name: str) -> None:
    parameters = Network(model, trains_text(config.model)).trained()
    given = found.tensors.get(name, {})
    checkpoint.check_tensors(parameters, given, f"{found.path / name}.safetensors")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(given[key])


def _compare(model: DiffusionModel, written: DiffusionModel, dtype: torch.dtype, out: Path) -> None:
    """Raises SaveError unless the folder holds this very model."""
    same = model.unet.config == written.unet.config and model.schedule.to_config() == written.schedule.to_config()
    for own, read in ((model.unet, written.unet), (model.text, written.text)):
        ours: dict[str, Tensor] = own.state_dict() if own is not None else {}
        theirs: dict[str, Tensor] = read.state_dict() if read is not None else {}
        same &= ours.keys() == theirs.keys() and all(torch.equal(ours[key].to(dtype), theirs[key]) for key in ours)
    if not same:
        raise SaveError(f"{out}: read back, it is not the model that was written; is the disk in order?")


def _preview(folder: Path, step: int) -> Path | None:
    """The last preview grid of `step` or before it."""
    steps = {int(match[1]): path for path in folder.glob("*") if (match := re.fullmatch(r"step_(\d+)\.png", path.name))}
    return max(((number, path) for number, path in steps.items() if number <= step), default=(0, None))[1]


def _recent_loss(metrics: Path, step: int) -> float | None:
    """The mean of the last losses that were logged up to `step`; a line that was cut short is passed over."""
    lines = metrics.read_bytes().splitlines() if metrics.is_file() else []
    records = [json.loads(line) for line in lines if step_of(line) <= step]
    losses = [record["loss"] for record in records if "loss" in record][-RECENT:]
    return sum(losses) / len(losses) if losses else None


def _facts(
    config: Config, found: checkpoint.Checkpoint, weights: str, model: DiffusionModel, loss: float | None
) -> str:
    """The rows of the card's table."""
    data, embedded, state = config.data, EMBEDDED.get(config.data.train_data_dir), found.state
    name = embedded.name if embedded else f"{Path(data.train_data_dir).resolve().name}, {state['samples']:,} images"
    colour = "colour" if model.codec.channels == 3 else "grey"
    facts = {
        "Images seen": f"{state['images_seen']:,} in {state['step']:,} steps of {config.train.train_batch_size}",
        "Data": name,
        "Licence of the data": data.license or (embedded.license if embedded else "not stated"),
        "Fingerprint of the data": f"sha256 {state['data']}",
        "Resolution": f"{data.resolution} x {data.resolution} pixels, {colour}",
        "Parameters": f"{sum(parameter.numel() for parameter in model.unet.parameters()):,} in the U-Net",
        "Prediction": model.schedule.prediction_type,
        "Noise levels": config.objective.noise_distribution,
        "Weights": "as trained" if weights == "model" else f"moving average, decay {weights.removeprefix('ema_')}",
        "Loss": "not known" if loss is None else f"{loss:.4f}, mean of the last {RECENT} steps",
        "Time": f"{state['seconds']:.0f} s",
    }
    return "\n".join(f"| {key} | {value} |" for key, value in facts.items())


def card(
    config: Config,
    found: checkpoint.Checkpoint,
    weights: str,
    model: DiffusionModel,
    name: str,
    loss: float | None,
    *,
    with_grid: bool,
) -> str:
    """The model card: what it is, how to draw with it, what it was trained on and how."""
    pixels = isinstance(model.codec, PixelCodec)
    library, pipeline = (
        ("diffusion_unet", "PixelTextToImagePipeline") if pixels else ("diffusers", "StableDiffusionPipeline")
    )
    prompts = config.validation.validation_prompts
    prompt = prompts[0] if prompts else "a prompt"
    picture = f"\n![{', '.join(prompts)}]({GRID})\n" if with_grid else ""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusion-unet
---

# {name}

A text-to-image diffusion model, trained with diffusion-unet.
{picture}
## Draw with it

```python
from {library} import {pipeline}

pipe = {pipeline}.from_pretrained({name!r})
pipe({prompt!r}, num_inference_steps={config.validation.num_inference_steps}, \
guidance_scale={config.validation.guidance_scale}).images[0].save("picture.png")
```

    diffusion-unet sample {name} "{prompt}" --seeds 0-7 --out out

It knows what its training images and captions showed, and no more.

## How it was trained

| | |
|---|---|
{_facts(config, found, weights, model, loss)}

<details><summary>All settings</summary>

```yaml
{_recipe(config)}```

</details>
"""


def _recipe(config: Config) -> str:
    """The settings as YAML, without folders of the machine that it was trained on."""
    settings: dict[str, Any] = to_dict(config)
    del settings["train"]["output_dir"]
    for section, key in (("data", "train_data_dir"), ("model", "pretrained")):
        folder = settings[section][key]
        settings[section][key] = folder and Path(folder).name
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return text
