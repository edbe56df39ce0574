"""A run made into a model folder that diffusers loads, with a card that tells how it came about."""

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_unet.checkpoint import write_bytes
from diffusion_unet.errors import InputError, SaveError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.single_file import write_single_file
from diffusion_unet.unet import UNet

from . import checkpoint
from .adapters import EMBEDDING_FILE, LORA_FILE, save_embedding, save_lora
from .card import GRID, SCHEDULER, card
from .config import Config, ScheduleConfig, config_from_dict
from .looking import OWN_AVERAGE, PREVIEWS
from .network import Network, fit_to_task
from .resume import refuse_other_model
from .start import model_before

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = ("diffusers", "kohya", "single-file")
RAW = "none"
CLOSE = 1e-4  # largest difference between the stock classes' prediction and ours, in standard deviations of it


def export(
    run: Path | str,
    out: Path | str,
    *,
    ema: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    layout: str = "diffusers",
) -> Path:
    """Writes the newest whole checkpoint of a run, reads it back, compares, and returns what was written.

    A run of a whole model gives a model folder, or with layout "single-file" one .safetensors file with the keys of the
    original Stable Diffusion; a run of an adapter its file in the layout of diffusers or "kohya", and one of textual
    inversion its vectors, each in a folder with a card.

    ema: name of the averaged weights; None takes the run's first where it has any, "none" the weights themselves.
    dtype: fp32 (None), fp16 or bf16; variant: a word in the names of the weight files, such as "fp16".
    Raises InputError for a run, a name or a layout that is not there, SaveError where it cannot be written."""
    run, out = Path(run), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not known; it is one of {', '.join(DTYPES)}")
    if not run.is_dir():
        raise InputError(f"{run}: there is no such run folder")
    found = checkpoint.load(run)
    if found is None:
        raise InputError(f"{run}: no checkpoint there; train first, or give the train.output_dir of a run")
    config = config_from_dict(found.state.get("config", {}), str(found.path))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, output_dir=str(run)))
    _check_layout(config, layout, variant)
    name = _weights(found, config, ema)
    model = _trained(found, config, name)
    picture = _preview(run / PREVIEWS, found.state["step"])
    files = {GRID: picture.read_bytes()} if picture else {}
    text = card(config, found, name, model, out.resolve().name, with_grid=bool(files))
    as_dtype = DTYPES[dtype or "fp32"]
    word = config.model.textual_inversion is not None
    if word or config.model.adapter is not None:
        files["README.md"] = text.encode()
        if config.model.schedule != ScheduleConfig():
            files[SCHEDULER] = (json.dumps(model.schedule.to_config(), indent=2) + "\n").encode()
        return _export_part(model, out, layout, as_dtype, files, word=word)
    if layout == "single-file":
        with _beside(out) as folder:
            model.save(folder, dtype=as_dtype)
            write_single_file(folder, out)
            _compare(model, DiffusionModel.load(out, config=folder), as_dtype, out)
        return out
    model.save(out, card=text, files=files, variant=variant, dtype=as_dtype)
    _compare(model, DiffusionModel.load(out, variant=variant), as_dtype, out)
    _compare_stock(out, variant)
    return out


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder for what is made on the way, on the same disk. Raises SaveError."""
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}.") as folder:
            yield Path(folder) / "model"
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"{out}: cannot be written ({error.strerror or error})") from error


def _check_layout(config: Config, layout: str, variant: str | None) -> None:
    adapter, word = config.model.adapter is not None, config.model.textual_inversion is not None
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout} is not known; it is one of {', '.join(LAYOUTS)}")
    if layout == "kohya" and not adapter:
        raise InputError("layout kohya: it is for runs of an adapter (model.adapter); take diffusers")
    if layout == "single-file" and (adapter or word):
        raise InputError("layout single-file: it is for whole models, and this run trained a part; take diffusers")
    if variant and (layout == "single-file" or adapter or word):
        raise InputError(f"variant {variant}: only in a model folder; take it out")


def _trained(found: checkpoint.Checkpoint, config: Config, name: str) -> DiffusionModel:
    """The model with the weights of one file of the checkpoint. Raises InputError."""
    before = model_before(config)
    refuse_other_model(found, config, before.fingerprint())
    model = fit_to_task(before, config)
    network = Network(model, config)
    network.uncertainty = None  # of use in training alone
    parameters, given = network.trained(), dict(found.tensors.get(name, {}))
    given = {key: value for key, value in given.items() if not key.startswith("uncertainty.")}
    checkpoint.check_tensors(parameters, given, f"{found.path / name}.safetensors")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(given[key])
    return model


def _export_part(
    model: DiffusionModel, out: Path, layout: str, dtype: torch.dtype, files: dict[str, bytes], *, word: bool
) -> Path:
    """An adapter or a new word, and what goes with it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} exists and is no folder: name another, nothing is overwritten")
    foreign = [name for name in files if (out / name).exists()]
    if foreign and not (out / (EMBEDDING_FILE if word else LORA_FILE)).exists():
        raise InputError(f"{out / foreign[0]} exists and is no part of an export: name another folder")
    if word:
        save_embedding(model, out, dtype=dtype)
    else:
        save_lora(model, out, layout="kohya" if layout == "kohya" else "diffusers", dtype=dtype)
    for name, content in files.items():
        write_bytes(out / name, content)
    return out


def _weights(found: checkpoint.Checkpoint, config: Config, ema: str | None) -> str:
    """Which file of the checkpoint holds the weights that are asked for; those that pictures were drawn with first."""
    averages = [name for name in (*config.train.ema, OWN_AVERAGE) if name in found.averages]
    if ema == RAW or (ema is None and not averages):
        return "model"
    if ema is None:
        return f"ema_{averages[0]}"
    if ema not in averages:
        known = ", ".join([*averages, RAW])
        raise InputError(f"{found.path}: no averaged weights named {ema!r}; there are {known}")
    return f"ema_{ema}"


def _compare(model: DiffusionModel, written: DiffusionModel, dtype: torch.dtype, out: Path) -> None:
    """Raises SaveError unless the folder holds this very model."""
    same = model.unet.config == written.unet.config and model.schedule.to_config() == written.schedule.to_config()
    for own, read in ((model.unet, written.unet), (model.text, written.text)):
        ours: dict[str, Tensor] = own.state_dict() if own is not None else {}
        theirs: dict[str, Tensor] = read.state_dict() if read is not None else {}
        same &= ours.keys() == theirs.keys() and all(torch.equal(ours[key].to(dtype), theirs[key]) for key in ours)
    if not same:
        raise SaveError(f"{out}: read back, it is not the model that was written; is the disk in order?")


@torch.no_grad()
def _compare_stock(out: Path, variant: str | None) -> None:
    """Raises SaveError unless diffusers' own class, loading the folder, predicts what ours does."""
    from diffusers import UNet2DConditionModel

    unet = UNet.from_pretrained(out, subfolder="unet", variant=variant, dtype=torch.float32)
    stock = UNet2DConditionModel.from_pretrained(
        out, subfolder="unet", variant=variant, torch_dtype=torch.float32, local_files_only=True
    ).eval()
    config, side = unet.config, 2 ** len(unet.config.block_out_channels)
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    x, context = normal(1, config.in_channels, side, side), None
    if unet.context_width is not None:
        context = normal(1, 4, unet.context_width)
    given: dict[str, Any] = {}
    if config.num_class_embeds is not None:
        given["class_labels"] = torch.zeros(1, dtype=torch.int64)
    added = None
    if config.addition_embed_type == "text_time":
        sizes = torch.zeros(1, 6)
        width = (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)
        added = {"text_embeds": normal(1, width), "time_ids": sizes}
    theirs = stock(x, 500.0, context, added_cond_kwargs=added, **given).sample
    named = {"pooled": added["text_embeds"], "time_ids": added["time_ids"]} if added else {}
    ours = unet(x, 500.0, context, **named, **given)
    if not (ours - theirs).abs().max() <= CLOSE * theirs.std():
        raise SaveError(f"{out}: diffusers' own class predicts something else from it than it was trained to")


def _preview(folder: Path, step: int) -> Path | None:
    """The last preview grid of `step` or before it."""
    steps = {int(match[1]): path for path in folder.glob("*") if (match := re.fullmatch(r"step_(\d+)\.png", path.name))}
    return max(((number, path) for number, path in steps.items() if number <= step), default=(0, None))[1]
