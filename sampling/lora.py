"""LoRA files, added to copies of the weights that they change: W + scale * strength * up @ down.

LoRA: Hu et al. 2021 (arXiv:2106.09685), equation 3. DoRA: Liu et al. 2024 (arXiv:2402.09353), equation 5. A network so
made costs no more to run than without. The names of layers are diffusers' in the core as in the drop-in; those of
sd-scripts (kohya) are turned into them by diffusers.

Shapes: r rank, in and out widths of a layer, k its kernel.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from diffusion_unet.checkpoint import read_safetensors
from diffusion_unet.clip import PREFIX
from diffusion_unet.errors import InputError
from diffusion_unet.unet import UNet
from diffusion_unet.untrusted import Field, checked, parse_object, read_header, shorten

if TYPE_CHECKING:
    from diffusion_unet.conditioning import PromptEncoder
    from diffusion_unet.config import UNetConfig
    from diffusion_unet.model import DiffusionModel

M = TypeVar("M", bound=nn.Module)
Place = tuple[str, str]  # a part of the model, and the name of a layer in it

_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_DOWN, _UP = ".lora_down.weight", ".lora_up.weight"
_PARTS = ("unet", "text_encoder", "text_encoder_2")
_KEY = re.compile(rf"({'|'.join(_PARTS)})\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True, eq=False)
class _Adapter:
    """What a file adds to one layer; where there is a magnitude, every row of the sum is then of that length."""

    down: Tensor  # [r, in] or [r, in, k, k]
    up: Tensor  # [out, r] or [out, r, 1, 1]
    strength: float  # alpha / r
    magnitude: Tensor | None  # [out], in any shape

    def fits(self, weight: Tensor) -> bool:
        rank, wide = self.down.flatten(1).shape
        fits = (*self.up.flatten(1).shape,) == (len(weight), rank) and wide == weight[0].numel()
        return fits and (self.magnitude is None or self.magnitude.numel() == len(weight))

    def applied(self, whole: Tensor, weight: Tensor, scale: float) -> Tensor:
        """`whole`, which is `weight` with what other files make of it, with this one too; all float32."""
        down, up = (matrix.to(weight.device, torch.float32).flatten(1) for matrix in (self.down, self.up))
        change = (scale * self.strength * up @ down).view_as(weight)
        if self.magnitude is None:
            return whole + change
        ratio = self.magnitude.to(weight.device, torch.float32).flatten() / (weight + change).flatten(1).norm(dim=1)
        return ratio.view(-1, *[1] * (weight.ndim - 1)) * (whole + change)


def merged(model: "DiffusionModel", loras: Sequence[tuple[Path, float]]) -> "tuple[UNet, PromptEncoder | None]":
    """The U-Net and the text encoder of `model` with LoRA files in their weights, each at a scale (1 as trained).

    Weights that no file changes are shared with `model`, which is left as it is. Several files add up; a DoRA scales
    what those before it made, by its own ratio, as in peft. Layouts: diffusers' (LoRA, DoRA, old attention processors),
    sd-scripts' and LyCORIS's LoRA and DoRA for Stable Diffusion 1.x, 2.x and XL.

    Raises InputError, one line, for a file that is no such LoRA, or is one for another model.
    """
    networks: dict[str, nn.Module] = {"unet": model.unet}
    if model.text is not None:
        networks |= {name: encoder.model for name, encoder in model.text.encoders.items()}
    layers = {part: _layers(network) for part, network in networks.items()}
    wanted: dict[Place, list[tuple[_Adapter, float]]] = {}
    for path, scale in loras:
        for (part, name), adapter in _checked(path, _read(path, model.unet.config), layers).items():
            wanted.setdefault((part, name), []).append((adapter, scale))
    changed: dict[str, dict[str, Tensor]] = {part: {} for part in networks}
    for (part, name), adapters in wanted.items():
        spelled, weight = layers[part][name]
        whole = base = weight.float()
        for adapter, scale in adapters:
            whole = adapter.applied(whole, base, scale)
        changed[part][f"{spelled}.weight"] = whole.to(weight.dtype)
    unet, text = twin(model.unet), model.text
    _replace(unet, changed.pop("unet"))
    if text is not None and any(changed.values()):
        text = twin(text, *(encoder.tokenizer for encoder in text.encoders.values()))
        for part, encoder in text.encoders.items():
            _replace(encoder.model, changed[part])
    return unet, text


def twin(network: M, *shared: object) -> M:
    """A copy on the very same memory, whose weights can be exchanged without a change to `network`'s.

    shared: what is in the network besides its tensors and is not to be copied.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    memo |= {id(thing): thing for thing in (*network.buffers(), *shared)}
    return copy.deepcopy(network, memo)


def weights_file(path: Path | str) -> Path:
    """The file, or the one .safetensors file of a folder. Raises InputError for pickled weights, and for no choice."""
    path = Path(path)
    if path.suffix.lower() in _PICKLED:
        raise InputError(f"{path}: pickled weights are never read, they can run code: convert it to .safetensors")
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} .safetensors files: name the one to take")
    return found[0]


def _replace(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    network.load_state_dict({**network.state_dict(), **weights}, assign=True)
    network.requires_grad_(False)


def _layers(network: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """By a name that all versions of transformers agree on: the name in memory, and the weight."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return {name.removeprefix(PREFIX): (name, module.weight.detach()) for name, module in found}


def _checked(
    path: Path, adapters: dict[Place, _Adapter], layers: Mapping[str, Mapping[str, tuple[str, Tensor]]]
) -> dict[Place, _Adapter]:
    """Raises InputError unless there is a layer for each adapter, and it is of the right size."""
    strange = [f"{part}.{name}" for part, name in adapters if name not in layers.get(part, {})]
    if strange:
        raise InputError(
            f"{path}: {len(strange)} of its {len(adapters)} layers are none of this model's, the first"
            f" {shorten(strange[0], 160)}: it is a LoRA for another model"
        )
    for (part, name), adapter in adapters.items():
        weight = layers[part][name][1]
        if not adapter.fits(weight):
            sizes = f"{list(adapter.up.shape)} times {list(adapter.down.shape)}"
            raise InputError(
                f"{path}: {part}.{name} is {sizes}, for a layer of {list(weight.shape)} here: it is a LoRA for another"
                " model"
            )
    return adapters


# --- files --------------------------------------------------------------------------------------------------------


def _read(path: Path, config: "UNetConfig") -> dict[Place, _Adapter]:
    path = weights_file(path)
    tensors = read_safetensors(path)
    if not tensors:
        raise InputError(f"{path}: holds no tensor: it is no LoRA")
    if all(key.startswith(_KOHYA) for key in tensors):
        return _read_kohya(path, tensors, config)
    settings = read_header(path).metadata.get("lora_adapter_metadata", "{}")
    strengths = _Strengths(parse_object(settings.encode(), str(path)), path)
    return {
        place: _adapter(path, place, parts, strengths.of(place)) for place, parts in _by_layer(path, tensors).items()
    }


def _read_kohya(path: Path, tensors: Mapping[str, Tensor], config: "UNetConfig") -> dict[Place, _Adapter]:
    """alpha and `dora_scale`, which diffusers leaves out, are found again by the very tensor that goes down."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    strange = [key for key in tensors if not key.endswith((_DOWN, _UP, ".alpha", ".dora_scale"))]
    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    strange += [key for key, alpha in alphas.items() if alpha.numel() != 1 or not alpha.isfinite()]
    if strange:
        _refuse(path, strange, tensors)
    bases = {id(tensor): key.removesuffix(_DOWN) for key, tensor in tensors.items() if key.endswith(_DOWN)}
    matrices = {key: tensor for key, tensor in tensors.items() if key.endswith((_DOWN, _UP))}
    try:
        converted, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(matrices, unet_config=config)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a LoRA of this model's kind ({shorten(str(error))})") from None
    adapters = {}
    for place, parts in _by_layer(path, converted).items():
        base = bases[id(parts["lora_A"])]
        if (scale := tensors.get(f"{base}.dora_scale")) is not None:
            parts["lora_magnitude_vector"] = scale
        alpha = tensors.get(f"{base}.alpha")
        strength = _Strength(None if alpha is None else float(alpha))
        adapters[place] = _adapter(path, place, parts, strength)
    return adapters


def _by_layer(path: Path, tensors: Mapping[str, Tensor]) -> dict[Place, dict[str, Tensor]]:
    """The tensors of each layer, in peft's spelling, out of any that diffusers has had."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    text = {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder")}
    spelled = {key: tensor for key, tensor in tensors.items() if key not in text}
    # The oldest spelling's table knows the later one too.
    spelled |= convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS_OLD)
    found: dict[Place, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in convert_unet_state_dict_to_peft(spelled).items():
        if match := _KEY.fullmatch(key):
            part, name, kind = match.groups()
            found.setdefault((part, name.removeprefix(PREFIX)), {})[kind] = tensor
        else:
            strange.append(key)
    if strange:
        _refuse(path, strange, tensors)
    return found


def _refuse(path: Path, strange: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    raise InputError(
        f"{path}: {len(strange)} of its {len(tensors)} tensors are no LoRA's, the first {shorten(strange[0], 160)}:"
        " what is read are LoRA and DoRA of diffusers, sd-scripts and LyCORIS"
    )


def _adapter(path: Path, place: Place, parts: Mapping[str, Tensor], strength: "_Strength") -> _Adapter:
    down, up = parts.get("lora_A"), parts.get("lora_B")
    if down is None or up is None or min(down.ndim, up.ndim) < 2 or not len(down):
        raise InputError(f"{path}: {shorten('.'.join(place), 160)} lacks one of its two matrices: the file is damaged")
    return _Adapter(down, up, strength.at(len(down)), parts.get("lora_magnitude_vector"))


@dataclass(frozen=True)
class _Strength:
    """By how much up @ down is multiplied; alpha None is that of the rank, which makes it 1."""

    alpha: float | None = None
    rooted: bool = False  # rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): the root of the rank divides

    def at(self, rank: int) -> float:
        alpha = rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.rooted else rank)


class _Strengths:
    """Those of every layer, as peft's settings in a file's header say."""

    def __init__(self, settings: Mapping[str, Any], path: Path) -> None:
        kinds = {"lora_alpha": Field(float), "use_rslora": Field(bool), "alpha_pattern": Field(dict)}
        fields = {f"{part}.{name}": field for part in _PARTS for name, field in kinds.items()}
        self._settings = checked(settings, fields, path)
        for part in _PARTS:
            for alpha in self._settings.get(f"{part}.alpha_pattern", {}).values():
                checked({"alpha_pattern": alpha}, {"alpha_pattern": Field(float)}, path)

    def of(self, place: Place) -> _Strength:
        part, name = place
        alpha = self._settings.get(f"{part}.lora_alpha")
        for end, own in self._settings.get(f"{part}.alpha_pattern", {}).items():
            if f".{name}".endswith(f".{end.removeprefix(PREFIX)}"):
                alpha = float(own)
        return _Strength(alpha, self._settings.get(f"{part}.use_rslora", False))
