"""Single files in the original layout of Stable Diffusion 1.x, 2.x and XL, read by diffusers into the parts of a model.

Which classes are made is decided here and by the known names of model_index.py, never by the file or the folder. What
diffusers' readers are given of the folder's configs is a copy that holds the fields that were checked, and no others.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_state, write_json
from .clip import load_tokenizer, text_settings
from .codec import LatentCodec, vae_settings
from .conditioning import PromptEncoder, TextEncoder
from .config import UNetConfig
from .errors import InputError
from .model_index import INDEX, PIPELINES, read_index
from .prompts import DualTextEncoder
from .schedule import NoiseSchedule
from .unet import UNet
from .untrusted import read_header, read_json

FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # of every such file
SCHEDULER = ["diffusers", "DDIMScheduler"]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_original(
    path: Path, config: Path | str | None, dtype: torch.dtype | None
) -> tuple[UNet, NoiseSchedule, PromptEncoder, LatentCodec]:
    """The parts of a DiffusionModel, in eval mode, from the weights of one .safetensors file.

    config: a diffusers folder with the configs and tokenizers of the same architecture; its weights are not read.
    dtype None is that of the file's U-Net. Raises InputError, one line that names the file or the folder.
    """
    if config is None:
        raise InputError(f"{path} holds weights alone: name a folder with the configs and tokenizers of its model, too")
    folder, dtype = Path(config), _dtype(path, dtype)
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
    configs = {
        "unet": settings.to_diffusers(),
        "vae": {"_class_name": "AutoencoderKL", **vae_settings(folder / "vae" / "config.json")},
        "text_encoder": _text_config(folder / "text_encoder", "CLIPTextModel"),
    }
    if xl:
        configs["text_encoder_2"] = _text_config(folder / "text_encoder_2", "CLIPTextModelWithProjection")
    with tempfile.TemporaryDirectory() as place:
        for name, values in configs.items():
            write_json(Path(place, name, "config.json"), values)
        parts = {name: index[name] for name in (*configs, *tokenizers)}
        write_json(Path(place, INDEX), {"_class_name": index["_class_name"], "scheduler": SCHEDULER, **parts})
        try:
            pipe = _read(path, place, xl, tokenizers, dtype)
        except Exception as error:  # whatever its readers raise, the file and the folder are what is wrong
            line = " ".join(str(error).split())[:200]
            raise InputError(f"{path} cannot be read with the configs of {folder}: {line}") from error
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


def _dtype(path: Path, wanted: torch.dtype | None) -> torch.dtype:
    """What the parts are to be computed in. Raises InputError for a file that is none of these at all."""
    if path.suffix != ".safetensors":  # by this name diffusers chooses its reader
        raise InputError(f"{path}: weights in one file are named *.safetensors, and others are never read")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    first = read_header(path).tensors.get(FIRST)
    if first is None:
        raise InputError(f"{path} has no {FIRST}: it is no model in the original layout of Stable Diffusion")
    if wanted is None and first.dtype not in _DTYPES:
        raise InputError(f"{path} is stored as {first.dtype}, in which nothing is computed: give a dtype")
    return wanted or _DTYPES[first.dtype]


def _text_config(folder: Path, kind: str) -> dict[str, Any]:
    return {**text_settings(folder / "config.json", kind), "architectures": [kind], "model_type": "clip_text_model"}


def _read(path: Path, configs: str, xl: bool, tokenizers: dict[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline; every part that `configs` could name a class for is checked, or given. Raises what they raise."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    given = {
        "feature_extractor": None,
        "image_encoder": None,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    pipeline: Any
    if xl:
        pipeline, given["add_watermarker"] = StableDiffusionXLPipeline, False
    else:
        pipeline, given["safety_checker"], given["requires_safety_checker"] = StableDiffusionPipeline, None, False
    with quiet():
        return pipeline.from_single_file(
            str(path), config=configs, local_files_only=True, torch_dtype=dtype, **tokenizers, **given
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
