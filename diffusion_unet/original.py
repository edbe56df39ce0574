"""Single files in the original layout of Stable Diffusion 1.x, 2.x and XL, read by diffusers into the parts of a model.

Which classes are made is decided here and by the known names of model_index.py, never by the file or the folder.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .checkpoint import load_state, read_json
from .clip import load_tokenizer, text_settings
from .codec import LatentCodec
from .conditioning import PromptEncoder, TextEncoder
from .config import UNetConfig
from .errors import InputError
from .model_index import INDEX, PIPELINES, read_index
from .prompts import DualTextEncoder
from .schedule import NoiseSchedule
from .unet import UNet

FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # of every such file


def load_original(
    path: Path, config: Path | str | None, dtype: torch.dtype | None
) -> tuple[UNet, NoiseSchedule, PromptEncoder, LatentCodec]:
    """The parts of a DiffusionModel, in eval mode, from the weights of one .safetensors file.

    config: a diffusers folder with the configs and tokenizers of the same architecture; its weights are not read.
    dtype None is that of the file's U-Net. Raises InputError, one line that names the file or the folder.
    """
    if config is None:
        raise InputError(f"{path} holds weights alone: name a folder with the configs and tokenizers of its model, too")
    folder, stored = Path(config), _dtype(path)
    index = read_index(folder)
    if index["_class_name"] not in PIPELINES:
        raise InputError(
            f"{folder / INDEX}: a {index['_class_name']} has no original layout; give a folder of SD or SDXL"
        )
    xl = PIPELINES[index["_class_name"]].xl
    settings = UNetConfig.from_diffusers(read_json(folder / "unet" / "config.json"), ignore_unknown=True)
    schedule = NoiseSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    tokenizers = {
        name: load_tokenizer(folder / name) for name in (["tokenizer", "tokenizer_2"] if xl else ["tokenizer"])
    }
    pipe = _read(path, folder, xl, tokenizers, dtype or stored)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            _check_whole(part, path)
    with torch.device("meta"):
        unet = UNet(settings)
    load_state(unet, pipe.unet.state_dict(), path)
    text: PromptEncoder = TextEncoder(tokenizers["tokenizer"], pipe.text_encoder)
    if isinstance(text, TextEncoder) and xl:
        second = TextEncoder(tokenizers["tokenizer_2"], pipe.text_encoder_2)
        text = DualTextEncoder(text, second, zeros_for_empty=index.get("force_zeros_for_empty_prompt", True))
    return unet.eval(), schedule, text.eval(), LatentCodec(pipe.vae)


def _dtype(path: Path) -> torch.dtype:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            if FIRST not in file.keys():  # noqa: SIM118 - it is no dictionary
                raise InputError(f"{path} has no {FIRST}: it is no model in the original layout of Stable Diffusion")
            dtype: torch.dtype = file.get_tensor(FIRST).dtype
            return dtype
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged, or no safetensors file ({error}); copy or download it again") from None


def _read(path: Path, folder: Path, xl: bool, tokenizers: dict[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline; every part that the folder could name a class for is checked, or given."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    text_settings(folder / "text_encoder" / "config.json", "CLIPTextModel")
    given = {
        "feature_extractor": None,
        "image_encoder": None,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    pipeline: Any
    if xl:
        text_settings(folder / "text_encoder_2" / "config.json", "CLIPTextModelWithProjection")
        pipeline, given["add_watermarker"] = StableDiffusionXLPipeline, False
    else:
        pipeline, given["safety_checker"], given["requires_safety_checker"] = StableDiffusionPipeline, None, False
    with _quiet():
        try:
            return pipeline.from_single_file(
                str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **tokenizers, **given
            )
        except Exception as error:  # whatever its readers raise, the file and the folder are what is wrong
            line = " ".join(str(error).split())[:200]
            raise InputError(f"{path} cannot be read with the configs of {folder}: {line}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' progress bar over the parts, and its lines about keys, which are checked here."""
    from diffusers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_whole(part: nn.Module, path: Path) -> None:
    missing = [key for key, value in part.state_dict().items() if value.is_meta]
    if missing:
        raise InputError(
            f"{path}: {missing[0]} of the {type(part).__name__} is missing; the config is of another model"
        )
