"""model_index.json: which pipeline of diffusers a model folder is, and of which classes its parts are.

Names in a file are compared with those known here, never imported.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .codec import PixelCodec
from .config import UNetConfig
from .errors import InputError
from .prompts import ClassLabels, DualTextEncoder
from .untrusted import is_file_name, read_json

if TYPE_CHECKING:
    from .model import DiffusionModel

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model"
PIXELS = "PixelTextToImagePipeline"
TEXT_TO_IMAGE, INPAINT, INSTRUCT_PIX2PIX = "text-to-image", "inpaint", "instruct-pix2pix"
PARTS = frozenset(
    (INDEX, "unet", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae", "README.md",
     "grid.png")
)  # fmt: skip

SETTINGS = ("pixel_mean", "pixel_std", "class_names", "force_zeros_for_empty_prompt", "is_cosxl_edit")


class Pipeline(NamedTuple):
    """A pipeline class on latents: what it is for, whether its text is SDXL's, and the parts left out on saving."""

    task: str
    xl: bool
    unused: tuple[str, ...]


_SD, _XL = ("feature_extractor", "image_encoder", "safety_checker"), ("feature_extractor", "image_encoder")
PIPELINES = {
    "StableDiffusionPipeline": Pipeline(TEXT_TO_IMAGE, False, _SD),
    "StableDiffusionInpaintPipeline": Pipeline(INPAINT, False, _SD),
    "StableDiffusionInstructPix2PixPipeline": Pipeline(INSTRUCT_PIX2PIX, False, _SD),
    "StableDiffusionXLPipeline": Pipeline(TEXT_TO_IMAGE, True, _XL),
    "StableDiffusionXLInpaintPipeline": Pipeline(INPAINT, True, _XL),
    "StableDiffusionXLInstructPix2PixPipeline": Pipeline(INSTRUCT_PIX2PIX, True, ()),
}

# What each part may be.
Known = tuple[list[Any], ...]
_ABSENT: list[Any] = [None, None]
_UNET: Known = (["diffusers", "UNet2DConditionModel"],)
_VAE: Known = (["diffusers", "AutoencoderKL"],)
_TEXT: Known = (["transformers", "CLIPTextModel"],)
_TEXT_2: Known = (["transformers", "CLIPTextModelWithProjection"],)
_TOKENIZER: Known = (["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"])


def task_of(config: UNetConfig) -> str | None:
    """What a U-Net with these inputs is for, or None where no pipeline known here gives it them.

    Beside the noisy picture, inpainting takes a mask and the masked picture (Rombach et al. 2022, as released), and
    InstructPix2Pix the picture to be edited (Brooks et al. 2023, arXiv:2211.09800, section 3.2).
    """
    own = config.out_channels
    tasks = {own: TEXT_TO_IMAGE, 2 * own + 1: INPAINT, 2 * own: INSTRUCT_PIX2PIX}
    return tasks.get(config.in_channels)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, each known entry checked. Raises InputError."""
    if not (folder / INDEX).is_file():
        if any(folder.glob("checkpoint-*")):
            raise InputError(f"{folder} is a training run: make a model of it, `diffusion-unet export {folder} MODEL`")
        what = f"is no model: it holds no {INDEX}" if folder.exists() else "is not there"
        raise InputError(f"{folder} {what}; give a model folder, as `diffusion-unet export` and diffusers write it")
    path = folder / INDEX
    index = read_json(path)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in (PIXELS, *PIPELINES):
        raise InputError(f"{path}: the class {ascii(name)[:80]} is not known here; {_listed([PIXELS, *PIPELINES])} are")
    expected = {"unet": _UNET, "text_encoder": _TEXT, "tokenizer": _TOKENIZER}
    if name == PIXELS:
        expected |= {"text_encoder": (*_TEXT, _ABSENT), "tokenizer": (*_TOKENIZER, _ABSENT)}
        _check_pixels(path, index)
    else:
        expected["vae"] = _VAE
    if name in PIPELINES and PIPELINES[name].xl:
        expected |= {"text_encoder_2": _TEXT_2, "tokenizer_2": _TOKENIZER}
        _check_xl(path, index)
    for key, known in expected.items():
        if index.get(key, _ABSENT) not in known:
            raise InputError(
                f"{path}: {key} is {ascii(index.get(key))[:80]}; {' or '.join(map(str, known))} can be worked with"
            )
    return index


def draws_from_prompts(folder: Path) -> bool:
    """Whether it is a model folder of a pipeline that draws from text, classes or nothing, and not from a picture."""
    if not (folder / INDEX).is_file():
        return False
    name = read_index(folder)["_class_name"]
    return name == PIXELS or PIPELINES[name].task == TEXT_TO_IMAGE


def stored_variant(folder: Path) -> str | None:
    """The word in the names of the weights, where there are no others. Raises InputError where there are several."""
    names = [path.name for path in (folder / "unet").glob("*.safetensors*") if is_file_name(path.name)]
    if not names or any(name.startswith(f"{WEIGHTS}.safetensors") or name.startswith(f"{WEIGHTS}-") for name in names):
        return None
    words = {name.split(".")[1].partition("-")[0] for name in names if name.startswith(f"{WEIGHTS}.")}
    if len(words) > 1:
        raise InputError(f"{folder}: weights of several variants ({', '.join(sorted(words))}): name the one to take")
    return next(iter(words), None)


def _check_pixels(path: Path, index: dict[str, Any]) -> None:
    for key in ("pixel_mean", "pixel_std"):
        value = index.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise InputError(f"{path}: {key} is {ascii(value)[:80]}; a number, of values in [-1, 1], is needed")
    names = index.get("class_names")
    if names is not None and (not isinstance(names, dict) or list(names) != [str(i) for i in range(len(names))]):
        raise InputError(f'{path}: class_names is {ascii(names)[:80]}; {{"0": "name of class 0", ...}} is needed')


def _check_xl(path: Path, index: dict[str, Any]) -> None:
    zeros = index.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise InputError(f"{path}: force_zeros_for_empty_prompt is {ascii(zeros)[:80]}; true or false is needed")
    if index.get("is_cosxl_edit"):
        raise InputError(f"{path}: is_cosxl_edit is set; CosXL's scaling of the picture to be edited is not known here")


def index_of(model: "DiffusionModel") -> dict[str, Any]:
    """The model_index.json with which diffusers loads the model's folder whole. Raises InputError where none would."""
    xl, task = isinstance(model.text, DualTextEncoder), model.task
    text = model.text is not None and bool(model.text.encoders)
    index: dict[str, Any] = {
        "_class_name": PIXELS,
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", model.schedule.to_config()["_class_name"]],
        "text_encoder": _TEXT[0] if text else _ABSENT,
        "tokenizer": _TOKENIZER[0] if text else _ABSENT,
        "unet": _UNET[0],
    }
    if isinstance(model.codec, PixelCodec):
        if task != TEXT_TO_IMAGE:
            raise InputError(f"a model on pixels cannot be saved for {task}: no pipeline would load it")
        index |= {"pixel_mean": model.codec.mean, "pixel_std": model.codec.std}
        if isinstance(model.text, ClassLabels):  # by number: diffusers takes a list for a part of the pipeline
            index["class_names"] = {str(number): name for number, name in enumerate(model.text.names)}
        return index
    name, kind = next((name, kind) for name, kind in PIPELINES.items() if (kind.task, kind.xl) == (task, xl))
    index |= {"_class_name": name, "vae": _VAE[0]}
    if isinstance(model.text, DualTextEncoder):
        index |= {"text_encoder_2": _TEXT_2[0], "tokenizer_2": _TOKENIZER[0], "add_watermarker": None}
        index["force_zeros_for_empty_prompt"] = model.text.zeros_for_empty
    else:
        index["requires_safety_checker"] = False
    return index | {key: _ABSENT for key in kind.unused}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]
