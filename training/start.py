"""What a run begins with: the samples that it may use, and the model as it is before the first step."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from diffusion_unet.checkpoint import write_bytes
from diffusion_unet.conditioning import PromptEncoder
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel

from . import data, sources
from .config import Config, DataConfig
from .engine import by_main, heed
from .imports import load_object
from .network import fit_to_task, load_pretrained, new_channels, new_model, told_by
from .report import some
from .tables import STREAMED

BASE = "base"  # folder of the model of a run from nothing, as it was before the first step
AT_ONCE = 1024  # captions
BAD, INDEX = "quarantine.jsonl", "index.jsonl"


def start(
    config: Config, accelerator: Accelerator, say: Callable[[str], None], *, progress: bool = False, again: bool = False
) -> tuple[data.Dataset, DiffusionModel, str]:
    """The samples, the model to be trained, float32 on the device, and its fingerprint as it is before the first step.

    again: the run has begun before, and its new model is in the run folder. Called by all processes. Raises InputError,
    SaveError."""
    pretrained = load_pretrained(config.model) if config.model.pretrained else None
    channels = pretrained.codec.channels if pretrained else new_channels(config.model, config.data.resolution)
    told = told_by(config.model, pretrained)
    if config.data.label_column is not None and told != "label":
        raise InputError("data.label_column: this model is not told classes; take it out")
    if config.data.shuffle_tags and told != "caption":
        raise InputError("data.shuffle_tags: this model is not told captions; take it out")
    if pretrained is not None and config.model.textual_inversion is None:
        check_prompts(config, pretrained)
    dataset = _look(config, accelerator, channels, told, say, shown("looking at images", progress))
    if pretrained is None and not again:
        # A new model is kept: its tokenizer and pixel statistics are the run's.
        base = Path(config.train.output_dir) / BASE
        by_main(accelerator, lambda: new_model(config, dataset).save(base))
    before = pretrained or model_before(config)
    fingerprint = before.fingerprint()
    model = fit_to_task(before, config).to(accelerator.device)
    if model.text is not None and accelerator.is_main_process and (cut := count_cut(model.text, dataset)):
        say(f"{cut} captions are longer than the text encoder reads, and are cut")
    check_prompts(config, model)
    if config.model.textual_inversion is not None and model.text is not None:
        check_word(model.text, dataset, config.model.textual_inversion.placeholder_token)
    return dataset, model, fingerprint


def check_paths(config: Config) -> None:
    """Raises InputError for code of the user's own that is not there."""
    load_object(config.optimizer.optimizer, "optimizer.optimizer")
    if ":" in config.objective.noise_distribution:
        load_object(config.objective.noise_distribution, "objective.noise_distribution")


def check_word(text: PromptEncoder, dataset: data.Dataset, word: str) -> None:
    """Raises InputError unless a caption holds the new word, and not behind where that is cut."""
    wanted = [
        set(encoder.tokenizer([word], add_special_tokens=False)["input_ids"][0]) for encoder in text.encoders.values()
    ]
    for caption in dict.fromkeys(caption for captions in dataset.captions for caption in captions):
        rows = text.tokenize([caption])[0].reshape(len(wanted), -1).tolist()
        if any(ids.issubset(row) for ids, row in zip(wanted, rows, strict=True)):
            return
    raise InputError(
        f"model.textual_inversion.placeholder_token: {word!a} is in no caption where the text encoder reads it, and so"
        " nothing would be learned: write it into captions, or into data.instance_prompt"
    )


def unlisted(dataset: data.Dataset) -> str | None:
    """What to say of images that the metadata of their folder does not list; None where there are none."""
    source = dataset.source.instances if isinstance(dataset.source, data.Instances) else dataset.source
    names = sources.unlisted(source)
    return f"{len(names)} images are not listed in the metadata, and are not used: {some(names)}" if names else None


def count_cut(text: PromptEncoder, dataset: data.Dataset) -> int:
    """How many different captions are longer than the text encoder reads."""
    captions = list(dict.fromkeys(caption for captions in dataset.captions for caption in captions))
    return sum(text.tokenize(captions[start : start + AT_ONCE])[1] for start in range(0, len(captions), AT_ONCE))


def model_before(config: Config) -> DiffusionModel:
    """The model that a run begins with, float32: `model.pretrained`, or one made for the run. Raises InputError."""
    if config.model.pretrained:
        return load_pretrained(config.model)
    return DiffusionModel.load(Path(config.train.output_dir) / BASE, dtype=torch.float32)


def untrained(config: Config) -> DiffusionModel:
    """That model, with what is trained beside it. Raises InputError."""
    return fit_to_task(model_before(config), config)


def with_cache(config: Config) -> DataConfig:
    """The settings of the data with the folder of caches that they leave to the run."""
    folder = config.data.cache_dir or str(Path(config.train.output_dir) / "cache")
    return dataclasses.replace(config.data, cache_dir=folder)


def shown(what: str, progress: bool) -> data.Watch:
    """Shows the progress of something that may take long, and ends it with Stopped once the process is told to stop."""

    def watch(items: Iterator[Any], count: int) -> Iterator[Any]:
        for item in tqdm(items, what, count, leave=False, disable=not progress, delay=2):
            heed()
            yield item

    return watch


def _look(
    config: Config,
    accelerator: Accelerator,
    channels: int,
    told: data.Told,
    say: Callable[[str], None],
    watch: data.Watch,
) -> data.Dataset:
    """The main process looks at the samples, the others read what it saw."""
    run, main = Path(config.train.output_dir), accelerator.is_main_process
    index = Path(str(with_cache(config).cache_dir)) / INDEX

    seen: list[data.Dataset] = []

    def look() -> None:
        source = data.open_data(with_cache(config), channels)
        seen.append(data.inspect(source, config.data, channels, told=told, index=index, watch=watch, write=main))

    by_main(accelerator, look)
    if not seen:
        look()
    dataset = seen[0]
    if config.data.streaming == "pure":
        dataset.fingerprint = STREAMED
    if dataset.bad and main:
        lines = "".join(json.dumps(bad._asdict()) + "\n" for bad in dataset.bad)
        write_bytes(run / BAD, lines.encode())
    for line in data.describe_bad(dataset.bad, run / BAD):
        say(line)
    if note := unlisted(dataset):
        say(note)
    refusal = data.too_many_bad(dataset, config.data)
    if refusal:
        raise InputError(refusal)
    return dataset


def check_prompts(config: Config, model: DiffusionModel) -> None:
    """Raises InputError for validation prompts that the model cannot take."""
    prompts = list(config.validation.validation_prompts)
    if model.text is not None:
        try:
            model.text.tokenize(prompts, refuse_long=True)
        except InputError as error:
            raise InputError(f"validation.validation_prompts: {error}") from None
    elif prompts:
        raise InputError("validation.validation_prompts: the model has no text encoder; take them out")
    if has_preview(config, model) and model.unet.config.sample_size is None:
        raise InputError(
            "model.pretrained: the U-Net's config.json states no sample_size, so nobody knows how large to draw a"
            f" preview: put it there{', or take validation.validation_prompts out' if prompts else ''}"
        )


def has_preview(config: Config, model: DiffusionModel) -> bool:
    """Whether pictures are drawn on the way: of prompts, or by a model that needs none and no picture either."""
    return bool(config.validation.validation_prompts) or (model.text is None and config.model.task == "text-to-image")
