"""The model card: what was trained, on what and how, and how to draw with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffusion_unet.checkpoint import write_bytes
from diffusion_unet.codec import PixelCodec
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.model_index import index_of

from . import checkpoint
from .adapters import CLIP_KEYS, EMBEDDING_FILE, LORA_FILE
from .config import Config, ScheduleConfig, to_dict
from .metrics import METRICS, load
from .sources import EMBEDDED

GRID, SCHEDULER = "grid.png", "scheduler_config.json"
RECENT = 100  # steps over which the card's loss is averaged
FOLDERS = (  # settings
    "data.train_data_dir",
    "data.class_data_dir",
    "data.cache_dir",
    "model.pretrained",
    "model.pretrained_config",
    "model.vae",
    "model.pretrained_text_encoder",
)
SCORES = "\n## Scores\n"


def card(
    config: Config, found: checkpoint.Checkpoint, weights: str, model: DiffusionModel, name: str, *, with_grid: bool
) -> str:
    """README.md of the export `name` of a run, with its picture where there is one.

    weights: which file of the checkpoint they are from, "model" or "ema_..."."""
    prompts = config.validation.validation_prompts
    picture = f"\n![{', '.join(prompts)}]({GRID})\n" if with_grid else ""
    part = "lora" if config.model.adapter else "textual_inversion" if config.model.textual_inversion else None
    base = f"base_model: {_base(config)}\n" if part else ""
    return f"""---
library_name: diffusers
pipeline_tag: {_PIPELINE_TAGS[config.model.task]}
{base}tags:
- {config.model.task}
- diffusion-unet{f"{chr(10)}- {part.replace('_', '-')}" if part else ""}
---

# {name}

{_what(config, model)}, trained with diffusion-unet.
{picture}
## Draw with it

```python
{_usage(config, model, name)}
```
{_command(config, name)}
It knows what its training images and captions showed, and no more.

## How it was trained

| | |
|---|---|
{_facts(config, found, weights, model)}

<details><summary>All settings</summary>

```yaml
{_recipe(config)}```

</details>
"""


_PIPELINE_TAGS = {
    "text-to-image": "text-to-image",
    "inpaint": "image-to-image",
    "instruct-pix2pix": "image-to-image",
}


def _what(config: Config, model: DiffusionModel) -> str:
    if config.model.adapter is not None:
        return f"A {'LoRA' if config.model.adapter.kind == 'lora' else 'DoRA'} for a text-to-image diffusion model"
    if config.model.textual_inversion is not None:
        return f"A new word, {config.model.textual_inversion.placeholder_token}, for a text-to-image diffusion model"
    if model.class_names is not None:
        return "A class-conditional diffusion model"
    if model.text is None:
        return "An unconditional diffusion model"
    return {
        "text-to-image": "A text-to-image diffusion model",
        "inpaint": "A diffusion model that fills holes in pictures",
        "instruct-pix2pix": "A diffusion model that changes pictures as it is told",
    }[config.model.task]


def _usage(config: Config, model: DiffusionModel, name: str) -> str:
    """Lines of Python that draw a picture."""
    validation, prompt = config.validation, _prompt(config)
    library = "diffusion_unet" if isinstance(model.codec, PixelCodec) else "diffusers"
    pipeline = index_of(model)["_class_name"]
    folder, load_part = name, ""
    if config.model.adapter is not None or config.model.textual_inversion is not None:
        folder, load_part = _base(config), _load_part(config, model, name)
    said = "" if model.text is None else f"{prompt!r}, "
    given = {"text-to-image": "", "inpaint": "image=picture, mask_image=mask, ", "instruct-pix2pix": "image=picture, "}
    return f"""from {library} import {pipeline}

pipe = {pipeline}.from_pretrained({folder!r}){load_part}
pipe({said}{given[config.model.task]}num_inference_steps={validation.num_inference_steps}, \
guidance_scale={validation.guidance_scale}).images[0].save("picture.png")"""


def _base(config: Config) -> str:
    """The folder that an adapter or a word belongs to."""
    return Path(config.model.pretrained_config or config.model.pretrained or "").name


def _prompt(config: Config) -> str:
    prompts = config.validation.validation_prompts
    return prompts[0] if prompts else config.data.instance_prompt or "a prompt"


def _load_part(config: Config, model: DiffusionModel, name: str) -> str:
    """Lines that put an adapter or a word into `pipe`, and its noise schedule where that is another."""
    lines, word = [""], config.model.textual_inversion
    encoders = list(model.text.encoders) if model.text is not None else []
    if config.model.adapter is not None:
        lines.append(f"pipe.load_lora_weights({name!r}, weight_name={LORA_FILE!r})")
    elif word is not None and len(encoders) > 1:
        lines[0] = "\nfrom safetensors.torch import load_file\n"
        lines.append(f"vectors = load_file({f'{name}/{EMBEDDING_FILE}'!r})")
        for key, encoder in zip(CLIP_KEYS.values(), encoders, strict=True):
            given = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{encoder.replace('text_encoder', 'tokenizer')}"
            lines.append(f"pipe.load_textual_inversion(vectors[{key!r}], token={word.placeholder_token!r}, {given})")
    else:
        lines.append(f"pipe.load_textual_inversion({name!r}, weight_name={EMBEDDING_FILE!r})")
    if config.model.schedule != ScheduleConfig():
        kind = model.schedule.to_config()["_class_name"]
        lines += [f"from diffusers import {kind}", f"pipe.scheduler = {kind}.from_pretrained({name!r})"]
    return "\n".join(lines)


def _command(config: Config, name: str) -> str:
    whole = config.model.adapter is None and config.model.textual_inversion is None
    if not whole or config.model.task != "text-to-image":
        return ""
    return f'\n    diffusion-unet sample {name} "{_prompt(config)}" --seeds 0-7 --out out\n'


def _facts(config: Config, found: checkpoint.Checkpoint, weights: str, model: DiffusionModel) -> str:
    """The rows of the card's table."""
    data, state, folder = config.data, found.state, config.data.train_data_dir
    embedded = EMBEDDED.get(folder or "")
    name = data.dataset_name or Path(folder or "").resolve().name
    colour = "colour" if model.codec.channels == 3 else "grey"
    streamed = data.streaming == "pure"  # of which the first rows are known
    amount = "streamed" if streamed else f"{state['samples']:,} images"
    size = f"about {data.resolution}^2" if data.aspect_buckets else f"{data.resolution} x {data.resolution}"
    average = weights.removeprefix("ema_")
    facts = {
        "Images seen": f"{state['images_seen']:,} in {state['step']:,} steps of {config.train.train_batch_size}",
        "Data": embedded.name if embedded else f"{name}, {amount}",
        "Licence of the data": data.license or (embedded.license if embedded else "not stated"),
        "Fingerprint of the data": "not known: streamed" if streamed else f"sha256 {state['data']}",
        "Resolution": f"{size} pixels, {colour}",
        "Parameters": f"{sum(parameter.numel() for parameter in model.unet.parameters()):,} in the U-Net",
        "Prediction": model.schedule.prediction_type,
        "Noise levels": config.objective.noise_distribution,
        "Weights": "as trained" if weights == "model" else f"moving average, {average}",
        **_losses(Path(config.train.output_dir) / METRICS, state["step"], average if weights != "model" else "raw"),
        "Time": f"{state['seconds']:.0f} s",
    }
    return "\n".join(f"| {key} | {value} |" for key, value in facts.items())


def _losses(metrics: Path, step: int, weights: str) -> dict[str, str]:
    """The mean of the last losses that were logged up to `step`, and of the last held-out loss."""
    records = [record for record in load(metrics) if record["step"] <= step] if metrics.is_file() else []
    losses = [record["loss"] for record in records if record.get("loss") is not None][-RECENT:]
    facts = {"Loss": f"{sum(losses) / len(losses):.4f}, mean of the last {RECENT} steps" if losses else "not known"}
    looks = [record["held_out_loss"].get(weights) for record in records if "held_out_loss" in record]
    if looks and looks[-1]:
        values = [value for value in looks[-1].values() if value is not None]
        facts["Held-out loss"] = f"{sum(values) / len(values):.4f}, mean of {len(values)} noise levels"
    return facts


def _recipe(config: Config) -> str:
    """The settings as YAML, without folders of the machine that it was trained on."""
    settings: dict[str, Any] = to_dict(config)
    del settings["train"]["output_dir"]
    for place in FOLDERS:
        section, _, key = place.partition(".")
        folder = settings[section][key]
        settings[section][key] = folder and Path(folder).name
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return text


def write_scores(path: Path, scores: Mapping[str, Any]) -> None:
    """Puts scores into a card, in the place of those that it had. Raises InputError without a card, SaveError."""
    if not path.is_file():
        raise InputError(f"{path}: there is no card that scores could be written into; leave --card out")
    before, _, after = path.read_text(encoding="utf-8").partition(SCORES)
    rest = after.partition("\n## ")
    text = f"{before.rstrip()}\n{SCORES}\n```json\n{json.dumps(scores, indent=2)}\n```\n"
    write_bytes(path, (text + (f"\n## {rest[2]}" if rest[1] else "")).encode())
