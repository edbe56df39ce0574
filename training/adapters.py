"""Small additions to a frozen model, trained instead of it: LoRA and DoRA, words for what it never saw, input channels.

LoRA: Hu et al. 2021 (arXiv:2106.09685), equation 3. DoRA: Liu et al. 2024 (arXiv:2402.09353), equation 5. Textual
inversion: Gal et al. 2022 (arXiv:2208.01618). Shapes: n vectors, D width of a token's embedding, B batch, L tokens.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_unet.checkpoint import cast, load_state, write_safetensors
from diffusion_unet.clip import PREFIX
from diffusion_unet.conditioning import TextEncoder
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.unet import UNet

from .config import AdapterConfig, TextualInversionConfig

ADAPTER = "default"  # peft's name of the one adapter that is trained
LORA_FILE, EMBEDDING_FILE = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"  # as diffusers looks for
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of a text encoder, where target_modules names none of it
CLIP_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # of SDXL's two encoders in one embedding file


# --- LoRA and DoRA ------------------------------------------------------------------------------------------------


def add_lora(model: DiffusionModel, config: AdapterConfig, *, text: bool, seed: int) -> None:
    """Freezes the model and adapts the layers whose names end in one of `target_modules`, linear ones and convolutions.

    In the text encoders, where `text`, they are the layers that `target_modules` names there, or else those of their
    attention. The adapters are float32 and drawn from `seed`, torch's own generator is left as it was; what goes up
    from the rank is zero, so that the model predicts what it did before.

    Raises InputError where peft is not installed, a name matches no layer, or there is no text encoder to adapt.
    """
    lora = _peft()
    networks = _networks(model) if text else {"unet": model.unet}
    if text and len(networks) == 1:
        raise InputError("model.adapter: this model has no text encoder to adapt; set train_text_encoder to false")
    unread = _freeze(model)
    targets = {name: _targets(network, config.target_modules, unread[name]) for name, network in networks.items()}
    for wanted in config.target_modules:
        if not any(wanted in found for found in targets.values()):
            raise InputError(
                f"model.adapter.target_modules: no linear layer or convolution of the {' or '.join(networks)} has a"
                f" name that ends in {wanted!a}"
            )
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.kind == "dora",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, network in networks.items():
            usual = () if name == "unet" else TEXT_TARGETS
            if ends := targets[name] or _targets(network, usual, unread[name]):
                places = {"target_modules": ends, "exclude_modules": unread[name] or None}
                lora.inject_adapter_in_model(lora.LoraConfig(**settings, **places), network, ADAPTER)
    for network in networks.values():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def save_lora(
    model: DiffusionModel,
    folder: Path | str,
    *,
    layout: Literal["diffusers", "kohya"] = "diffusers",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the adapters of `add_lora` as `folder`/pytorch_lora_weights.safetensors, and returns that file.

    diffusers: what its pipelines' `load_lora_weights` reads, LoRA and DoRA; alpha is in the file's metadata.
    kohya: the layout of sd-scripts and LyCORIS, which most programs read, diffusers too; SDXL's U-Net with the names
    of the original network, as sd-scripts has them. Diffusers reads a text encoder's part where out_proj is among its
    layers. A DoRA's magnitude is LyCORIS's `dora_scale` [out, 1, ...], of the norm over each output of the whole
    weight; diffusers leaves it out and ComfyUI takes the base's norm: for a DoRA `diffusers` is the layout to take.

    dtype: of the tensors, None float32. metadata: more entries for the file's header.
    Raises InputError where nothing is adapted or a value does not fit in `dtype`; SaveError.
    """
    found = {name: dict(_adapters(network)) for name, network in _networks(model).items()}
    layers = {name: adapters for name, adapters in found.items() if adapters}
    if not layers:
        raise InputError(f"{folder}: the model has no adapter to save")
    tensors, header = _kohya(layers, model.unet) if layout == "kohya" else _diffusers(layers)
    path = Path(folder) / LORA_FILE
    tensors = cast(tensors, dtype, str(path))
    write_safetensors(path, tensors, {"format": "pt", **header, **(metadata or {})})
    return path


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """Of one layer W: W + alpha / rank * up @ down, each row then of the length `magnitude` where there is one."""

    down: Tensor  # [rank, in] or [rank, in, k, k]
    up: Tensor  # [out, rank] or [out, rank, 1, 1]
    alpha: float
    magnitude: Tensor | None  # [out] or [1, out, 1, 1]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("model.adapter: this needs peft: pip install 'diffusion-unet[lora]'") from None
    return peft


def _encoders(model: DiffusionModel) -> dict[str, TextEncoder]:
    return {} if model.text is None else model.text.encoders


def _networks(model: DiffusionModel) -> dict[str, nn.Module]:
    return {"unet": model.unet} | {name: part.model for name, part in _encoders(model).items()}


def _freeze(model: DiffusionModel) -> dict[str, list[str]]:
    """The layers of each network that stay frozen where all is to be trained, as their output is not read: an adapter
    there would never get a gradient. All are frozen afterwards."""
    parts = [part for part in (model.unet, model.text) if part is not None]
    for part in parts:
        part.requires_grad_(True)
    networks = {name: network.named_modules() for name, network in _networks(model).items()}
    unread = {
        name: [layer for layer, module in modules if _is_layer(module) and not module.weight.requires_grad]
        for name, modules in networks.items()
    }
    for part in parts:
        part.requires_grad_(False)
    return unread


def _is_layer(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    return isinstance(module, nn.Linear | nn.Conv2d)


def _targets(network: nn.Module, wanted: Sequence[str], unread: Sequence[str]) -> list[str]:
    """Those of the ends of names that some layer of the network has which is read."""
    names = [name for name, module in network.named_modules() if _is_layer(module) and name not in unread]
    return [end for end in wanted if any(name == end or name.endswith("." + end) for name in names)]


def _adapters(network: nn.Module) -> Iterator[tuple[str, _Adapter]]:
    """The adapted layers by name, a text encoder's as the published files spell them."""
    layer: Any
    for name, layer in network.named_modules():
        if ADAPTER in getattr(layer, "lora_B", {}):
            published = isinstance(network, UNet) or name.startswith((PREFIX, "text_projection"))
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            scales = layer.lora_magnitude_vector
            magnitude = scales[ADAPTER].weight if ADAPTER in scales else None
            yield name if published else PREFIX + name, _Adapter(down, up, layer.lora_alpha[ADAPTER], magnitude)


_UNET_KEYS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# Transformers finds the place of a magnitude by its whole name, peft's own by one without the end.
_TEXT_KEYS = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "lora_magnitude_vector.weight")
Written = tuple[dict[str, Tensor], dict[str, str]]  # tensors, and entries of the header


def _diffusers(layers: Mapping[str, Mapping[str, _Adapter]]) -> Written:
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, adapters in layers.items():
        down, up, magnitude = _UNET_KEYS if part == "unet" else _TEXT_KEYS
        for name, adapter in adapters.items():
            tensors[f"{part}.{name}.{down}"] = adapter.down
            tensors[f"{part}.{name}.{up}"] = adapter.up
            if adapter.magnitude is not None:
                tensors[f"{part}.{name}.{magnitude}"] = adapter.magnitude
        settings[f"{part}.r"] = adapter.down.shape[0]
        settings[f"{part}.lora_alpha"] = adapter.alpha
        settings[f"{part}.use_dora"] = adapter.magnitude is not None
        # In memory the names of a text encoder lack this with newer transformers, which match them as they are.
        settings[f"{part}.target_modules"] = sorted({name.removeprefix(PREFIX) for name in adapters})
    return tensors, {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)}


def _kohya(layers: Mapping[str, Mapping[str, _Adapter]], unet: UNet) -> Written:
    sdxl = unet.config.addition_embed_type is not None
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if sdxl else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    tensors = {}
    for part, adapters in layers.items():
        for name, adapter in adapters.items():
            spelled = original_name(name, unet) if sdxl and part == "unet" else name
            key = f"{prefixes[part]}_{spelled.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = adapter.down
            tensors[f"{key}.lora_up.weight"] = adapter.up
            tensors[f"{key}.alpha"] = torch.tensor(float(adapter.alpha))
            if adapter.magnitude is not None:
                tensors[f"{key}.dora_scale"] = adapter.magnitude.reshape(-1, *[1] * (adapter.down.ndim - 1))
    settings = {"ss_network_dim": adapter.down.shape[0], "ss_network_alpha": adapter.alpha}
    return tensors, {key: str(value) for key, value in settings.items()}


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def original_name(name: str, unet: UNet) -> str:
    """A layer of an SDXL U-Net as the network of its authors names it, whose blocks are counted through."""
    if name in _OUTER:
        return _OUTER[name]
    if middle := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, number, rest = middle.groups()
        place = 2 * int(number) + (kind == "attentions")  # they take turns, a residual block first
        return f"middle_block.{place}.{_RESNET.get(rest, rest)}"
    match = _LAYER.fullmatch(name)
    if match is None:
        raise InputError(f"{name}: sd-scripts has no name for this layer; save in diffusers' layout")
    side, level, kind, layer, rest = match.groups()
    levels = unet.config.down_levels if side == "down" else unet.config.up_levels
    before = sum(len(each.depths) + (side == "down") for each in levels[: int(level)])
    depths = levels[int(level)].depths
    if kind == "downsamplers":
        return f"input_blocks.{1 + before + len(depths)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{before + len(depths) - 1}.{2 if depths[-1] else 1}.conv"
    block = f"input_blocks.{1 + before + int(layer)}" if side == "down" else f"output_blocks.{before + int(layer)}"
    return f"{block}.{'0' if kind == 'resnets' else '1'}.{_RESNET.get(rest, rest)}"


# --- textual inversion --------------------------------------------------------------------------------------------


class LearnedTokens(nn.Module):
    """The embedding of a text encoder, frozen, and a placeholder's own vectors [n, D], float32 and trained."""

    def __init__(self, base: nn.Embedding, first: int, vectors: Tensor, placeholder: str) -> None:
        super().__init__()
        self.base = base
        self.first = first  # number of the first of the n tokens; all below it are the base's
        self.vectors = nn.Parameter(vectors)
        self.placeholder = placeholder

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> [B, L, D]."""
        known: Tensor = self.base(ids.clamp(max=self.first - 1))
        learned = F.embedding((ids - self.first).clamp(min=0), self.vectors).to(known.dtype)
        return torch.where((ids >= self.first)[..., None], learned, known)


class MultiVectorTokenizer:
    """A tokenizer that reads a placeholder as all of its tokens, as diffusers' pipelines do for their prompts."""

    def __init__(self, tokenizer: Any, tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(tokens)

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
        """The ids of each text under `input_ids`, of any length."""
        rows = self._tokenizer(list(texts), **options)["input_ids"]
        first, tokens = self._tokens[0], self._tokens
        return {"input_ids": [[i for token in row for i in (tokens if token == first else [token])] for row in rows]}

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy being made asks before there is anything
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


def add_tokens(model: DiffusionModel, config: TextualInversionConfig) -> None:
    """Freezes the model and teaches its tokenizers `placeholder_token`, with `num_vectors` vectors that are trained.

    The tokens are placeholder, placeholder_1, ... as diffusers names them; a caption needs the first only. Each vector
    starts as that of `initializer_token`.

    Raises InputError where there is no text encoder, the placeholder is a token already or holds white space, or the
    initializer is not one token.
    """
    encoders = _encoders(model)
    if not encoders:
        raise InputError("model.textual_inversion: the model has no text encoder")
    placeholder, word = config.placeholder_token, config.initializer_token
    names = [placeholder, *(f"{placeholder}_{i}" for i in range(1, config.num_vectors))]
    if not placeholder or placeholder != "".join(placeholder.split()):
        raise InputError(
            f"model.textual_inversion.placeholder_token: {placeholder!a} must be one word, such as <my-cat>"
        )
    starts = {}
    for key, part in encoders.items():
        tokenizer = part.tokenizer
        if taken := [name for name in names if len(_ids(tokenizer, name)) == 1 or name in tokenizer.get_vocab()]:
            raise InputError(
                f"model.textual_inversion.placeholder_token: {taken[0]!a} is a token of the {key} already: take one"
                f" that is not, such as <{placeholder.strip('<>')}-1>"
            )
        starts[key] = _ids(tokenizer, word)
        if len(starts[key]) != 1:
            raise InputError(
                f"model.textual_inversion.initializer_token: {word!a} is {len(starts[key])} tokens of the {key}; take"
                " a word that is one"
            )
    model.unet.requires_grad_(False)
    for key, part in encoders.items():
        part.tokenizer.add_tokens(names)
        tokens = part.tokenizer.convert_tokens_to_ids(names)
        base = _clip(part).requires_grad_(False).get_input_embeddings()
        vectors = base.weight[starts[key]].float().repeat(len(names), 1)
        _clip(part).set_input_embeddings(LearnedTokens(base, tokens[0], vectors, placeholder))
        if len(names) > 1:
            part.tokenizer = MultiVectorTokenizer(part.tokenizer, tokens)


def save_embedding(
    model: DiffusionModel,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the vectors of `add_tokens` as `folder`/learned_embeds.safetensors, and returns that file.

    {placeholder: [n, D]}, which diffusers' `load_textual_inversion` and others read; of SDXL's two encoders `clip_l`
    and `clip_g`, given to it one after the other. dtype: of the vectors, None float32. metadata: for the file's header.
    Raises InputError where there are no such vectors or a value does not fit in `dtype`; SaveError.
    """
    layers = {name: _clip(part).get_input_embeddings() for name, part in _encoders(model).items()}
    learned = {name: layer for name, layer in layers.items() if isinstance(layer, LearnedTokens)}
    if not learned:
        raise InputError(f"{folder}: the model has no placeholder to save")
    keys = CLIP_KEYS if len(learned) > 1 else {name: layer.placeholder for name, layer in learned.items()}
    path = Path(folder) / EMBEDDING_FILE
    tensors = cast({keys[name]: layer.vectors for name, layer in learned.items()}, dtype, str(path))
    placeholder = next(iter(learned.values())).placeholder
    write_safetensors(path, tensors, {"format": "pt", "placeholder_token": placeholder, **(metadata or {})})
    return path


def _clip(encoder: TextEncoder) -> Any:
    """The transformer, with the methods of transformers that a plain module has not."""
    return encoder.model


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


# --- inpainting, InstructPix2Pix ----------------------------------------------------------------------------------


def widen_conv_in(unet: UNet, in_channels: int) -> UNet:
    """The same network for more input channels, whose weights are zero: it predicts what it did, whatever they hold.

    9 for inpainting (Rombach et al. 2022: noise, mask, masked picture), 8 for InstructPix2Pix (Brooks et al. 2023,
    section 3.2). All weights but those of `conv_in` are shared with `unet`. Raises InputError for fewer channels.
    """
    had = unet.config.in_channels
    if in_channels < had:
        raise InputError(f"conv_in: the U-Net takes {had} channels already, and {in_channels} are asked for")
    with torch.device("meta"):
        wide = UNet(dataclasses.replace(unet.config, in_channels=in_channels))
    weights = unet.state_dict()
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, in_channels - had))
    load_state(wide, weights, "the U-Net to be widened")
    return wide.train(unet.training)
