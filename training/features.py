"""Networks that look at pictures for a score: the shipped classifier, a CLIP model in a folder, or one of the user's.

Each takes a list of pictures, of any size and mode, and gives a tensor [B, D]: features, or logits of D classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_unet.checkpoint import load_state, read_weights
from diffusion_unet.clip import TEXT_FIELDS, load_tokenizer
from diffusion_unet.conditioning import TextEncoder
from diffusion_unet.errors import InputError
from diffusion_unet.untrusted import Field, checked, read_json, shorten

from . import fashion
from .imports import load_object

Device = torch.device | str
Network = Callable[[list[Image.Image]], Tensor]

FASHION = "fashion"
MAX_SIDE = 4096  # in pixels, of what a CLIP model sees
VISION_FIELDS = {
    **{name: TEXT_FIELDS[name] for name in TEXT_FIELDS if not name.endswith("_id") and not name.startswith("vocab")},
    **dict.fromkeys(("num_channels", "image_size", "patch_size"), Field(int, 1, MAX_SIDE)),
}


def feature_network(name: str, device: Device = "cpu", key: str = "--features") -> Network:
    """Features [B, D] of pictures, for FID and KID.

    name: "fashion", what the classifier of the embedded photographs sees before it decides (720 numbers); the folder of
    a transformers CLIP model, whose image embeddings they are, of any length as CLIP's own; or "package.module:name", a
    callable of the user's own. key: what messages call the name. Raises InputError."""
    if Path(name).is_dir():
        return Clip.load(name, device).images
    if name != FASHION:
        return _own(name, key)
    classifier = fashion.Classifier.load().to(device)
    classifier.head = nn.Identity()  # type: ignore[assignment]
    return _looking(classifier, device)


def classifier_network(name: str, device: Device = "cpu", key: str = "--classifier") -> Network:
    """Logits [B, classes] of pictures, for prompt accuracy: "fashion", or "package.module:name", a callable of the
    user's own. Raises InputError."""
    return _looking(fashion.Classifier.load().to(device), device) if name == FASHION else _own(name, key)


def _looking(classifier: fashion.Classifier, device: Device) -> Network:
    def look(images: list[Image.Image]) -> Tensor:
        colours = [torch.from_numpy(np.asarray(image.convert("RGB"), np.float32)) for image in images]  # H W 3
        small = [fashion.resize(pixels.mean(dim=2)[None, None] / 255, 28) for pixels in colours]
        return classifier.logits(torch.cat(small).to(device))

    return look


def _own(path: str, key: str) -> Network:
    if ":" not in path:
        raise InputError(f"{key}: {path} is no folder, no name known here, and no package.module:name")
    network = load_object(path, key)
    if not callable(network):
        raise InputError(f"{key}: {path} cannot be called with a list of pictures")

    def look(images: list[Image.Image]) -> Tensor:
        try:
            answer = network(images)
        except Exception as error:  # whatever the user's own code raises
            line = " ".join(str(error).split())[:200]
            raise InputError(
                f"{key}: {path} failed on {len(images)} pictures: {type(error).__name__}: {line}"
            ) from error
        if not (isinstance(answer, Tensor) and answer.ndim == 2 and len(answer) == len(images)):
            got = f"a tensor {list(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            raise InputError(f"{key}: {path} gave {got} for {len(images)} pictures: give a tensor [{len(images)}, D]")
        return answer

    return look


# ---- CLIP


@dataclass(frozen=True)
class Preparation:
    """What is done to a picture before a CLIP model sees it; sizes in pixels, None where a step is left out."""

    size: int | tuple[int, int] | None  # of the shorter side, or (height, width)
    crop: tuple[int, int] | None  # (height, width), from the middle
    resample: int  # Pillow's number of the filter
    scale: float  # of the values 0 to 255
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> "Preparation":
        """By a transformers preprocessor_config.json. Raises InputError."""
        settings = read_json(path)

        def wanted(step: str) -> bool:
            return settings.get(f"do_{step}", True) is not False

        normalized = wanted("normalize")
        try:
            size = settings["size"] if wanted("resize") else None
            if isinstance(size, Mapping):
                size = size.get("shortest_edge") or (size["height"], size["width"])
            crop = settings["crop_size"] if wanted("center_crop") else None
            crop = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else crop and (crop, crop)
            for side in (*(size if isinstance(size, tuple) else (size,)), *(crop or ())):
                if side is not None and (type(side) is not int or not 0 < side <= MAX_SIDE):
                    raise ValueError(f"a side of {ascii(side)[:40]} pixels")
            made = cls(
                size,
                crop,
                settings.get("resample", Image.Resampling.BICUBIC),
                settings.get("rescale_factor", 1 / 255) if wanted("rescale") else 1.0,
                tuple(settings["image_mean"]) if normalized else (0.0,) * 3,
                tuple(settings["image_std"]) if normalized else (1.0,) * 3,
            )
            made(Image.new("RGB", (2, 3)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: is not how a CLIP model's pictures are prepared ({error})") from None
        return made

    def __call__(self, image: Image.Image) -> Tensor:
        """Float32 [3, H, W]. Raises ValueError where the middle is larger than the picture."""
        image = image.convert("RGB")
        width, height = image.size
        if isinstance(self.size, int):
            short = min(width, height)
            height, width = (int(self.size * side / short) for side in (height, width))
        elif self.size:
            height, width = self.size
        image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if min(top, left) < 0:
                raise ValueError(f"nothing of {self.crop[0]}x{self.crop[1]} can be cut from {height}x{width}")
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        values = np.asarray(image, np.float32) * self.scale  # H W 3
        return torch.from_numpy((values - np.array(self.mean)) / np.array(self.std)).float().permute(2, 0, 1)


class Clip:
    """A transformers CLIP model: pictures and texts in one space (Radford et al. 2021, arXiv:2103.00020)."""

    def __init__(self, model: Any, tokenizer: Any, preparation: Preparation):
        self.model, self.preparation = model.eval(), preparation
        self._text = TextEncoder(tokenizer, model.text_model)

    @classmethod
    def load(cls, folder: Path | str, device: Device = "cpu") -> "Clip":
        """From a folder with config.json, model.safetensors, preprocessor_config.json and a tokenizer's files; nothing
        is looked for elsewhere. Raises InputError."""
        from transformers import CLIPConfig, CLIPModel

        folder = Path(folder)
        settings = read_json(folder / "config.json")
        if settings.get("model_type") != "clip":
            kind = settings.get("model_type")
            raise InputError(f"{folder}: holds a model of type {kind!a}: the whole CLIP model is needed, type 'clip'")
        parts = {}
        for part, fields in (("text_config", TEXT_FIELDS), ("vision_config", VISION_FIELDS)):
            # Files of 2022 hold the second, which goes before the first.
            given = checked(settings, {name: Field(dict) for name in (part, f"{part}_dict")}, folder / "config.json")
            parts[part] = checked({k: v for each in given.values() for k, v in each.items()}, fields, folder)
        whole = checked(settings, {"projection_dim": TEXT_FIELDS["projection_dim"]}, folder / "config.json")
        tensors, path = read_weights(folder, "model")
        try:
            with torch.device("meta"):
                model = CLIPModel(CLIPConfig(**whole, **parts))
        except Exception as error:  # whatever its checks raise, the file is what is wrong
            raise InputError(
                f"{folder}: its config.json describes no CLIP model: {shorten(str(error), 120)}"
            ) from error
        own = model.state_dict()
        constants = [key for key in tensors if key.endswith(".position_ids") and key not in own]  # in files of 2022
        load_state(model, {key: value for key, value in tensors.items() if key not in constants}, path)
        for part in (model.text_model.embeddings, model.vision_model.embeddings):  # constants that no file holds
            part.position_ids = torch.arange(part.position_embedding.num_embeddings)[None]
        preparation = Preparation.read(folder / "preprocessor_config.json")
        return cls(model.float().to(device), load_tokenizer(folder), preparation)

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> Tensor:
        """Embeddings [B, D] of pictures, of any length."""
        x = torch.stack([self.preparation(image) for image in images]).to(self.model.device)
        embeddings: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)
        return embeddings

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """Embeddings [B, D] of texts, of any length, and how many texts were cut to what the model reads."""
        ids, cut = self._text.tokenize(texts)
        states = self.model.text_model(input_ids=ids.to(self.model.device))
        embeddings: Tensor = self.model.text_projection(states.pooler_output)
        return embeddings, cut
