"""Networks of diffusers and transformers that adapters bring along, read strictly from local files.

Every setting is checked before anything is made of it, and weights go straight to their places.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_unet.checkpoint import load_state, read_safetensors, read_weights
from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.original import quiet
from diffusion_unet.unet import WEIGHTS, UNet
from diffusion_unet.untrusted import Field, checked, read_json, shorten

_SIZE = Field(int, 1, 1 << 16)
_CONTROL_FIELDS = {
    "conditioning_channels": Field(int, 1, 16),
    "conditioning_embedding_out_channels": Field(int, 1, 1 << 16, listed=True),
    "controlnet_conditioning_channel_order": Field(str),
    "global_pool_conditions": Field(bool),
}
_ALIKE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels", "addition_embed_type")

# The fields of a CLIP vision config that decide its numbers.
_VISION_FIELDS = {
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "projection_dim": _SIZE,
    "num_hidden_layers": Field(int, 1, 256),
    "num_attention_heads": _SIZE,
    "image_size": Field(int, 1, 4096),
    "patch_size": Field(int, 1, 4096),
    "hidden_act": Field(str),
    "layer_norm_eps": Field(float, 0, 1),
}
_VISION_PREFIX = "vision_model."  # of most keys in every published file


def load_controlnet(folder: Path, unet: UNet) -> Any:
    """The diffusers.ControlNetModel in a folder, for `unet` and on its device, in its dtype.

    Raises InputError for one that is damaged, made for another U-Net, or of a kind that is not known here.
    """
    from diffusers import ControlNetModel

    path = folder / "config.json"
    raw, own = read_json(path), unet.config.to_diffusers()
    if raw.get("_class_name") != "ControlNetModel":
        raise InputError(f"{path} describes a {shorten(str(raw.get('_class_name')))}: a ControlNetModel is needed")
    parameters = inspect.signature(ControlNetModel.__init__).parameters
    for name in _ALIKE:
        default = parameters[name].default
        its, ours = raw.get(name, default), own["out_channels" if name == "in_channels" else name]
        if (list(its) if isinstance(its, tuple) else its) != ours:
            raise InputError(
                f"{path}: {name} is {shorten(str(its))}, and {ours} fits this model: it is for another one"
            )
    values = checked(raw, _CONTROL_FIELDS, path)
    if (
        values.pop("controlnet_conditioning_channel_order", "rgb") != "rgb"
        or values.get("conditioning_channels", 3) != 3
    ):
        raise InputError(f"{path}: a ControlNet of pictures that are not RGB is not known here")
    if values.pop("global_pool_conditions", False):
        raise InputError(f"{path}: global_pool_conditions is set, which is not known here")
    if len(values.get("conditioning_embedding_out_channels", ())) > 16:
        raise InputError(f"{path}: conditioning_embedding_out_channels has over 16 levels")
    # What it has in common with a U-Net is checked as a U-Net's.
    names = (own.keys() | {"num_attention_heads"}) & parameters.keys()
    rest = {name: own[name] for name in ("up_block_types", "out_channels")}
    try:
        config = UNetConfig.from_diffusers(rest | {name: raw[name] for name in names & raw.keys()}).to_diffusers()
        with torch.device("meta"):
            net = ControlNetModel(**{name: config[name] for name in names & config.keys()}, **values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    _load(net, folder, WEIGHTS)
    with quiet():
        return net.to(unet.device, unet.dtype)


def load_drop_in(unet: UNet, path: Path, scale: float) -> tuple[Any, nn.Module]:
    """The drop-in on the very weights of `unet` with the IP-Adapter in a file, and the layer that makes tokens of what
    the image encoder says. The drop-in is given these tokens, as `image_embeds` [B, 1, T, D].

    Raises InputError for a file that is no such adapter, or one for another U-Net.
    """
    from diffusers.models import embeddings
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    from diffusion_unet.unet_2d_condition import UNet2DConditionModel

    if not isinstance(unet.config.cross_attention_dim, int) or unet.config.encoder_hid_dim is not None:
        raise InputError(f"{path}: this model attends to no text of one width, so no IP-Adapter fits it")
    state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in read_safetensors(path).items():
        part, _, name = key.partition(".")
        if part not in state:
            raise InputError(f"{path}: {shorten(key, 160)} is no tensor of an IP-Adapter (image_proj.*, ip_adapter.*)")
        state[part][name] = tensor
    with torch.device("meta"):
        drop_in: Any = UNet2DConditionModel(
            **{name: value for name, value in unet.config.to_diffusers().items() if name != "_class_name"}
        )
    drop_in.load_state_dict(unet.state_dict(), assign=True)
    try:
        with torch.random.fork_rng(devices=[]), quiet():  # layers are made with random weights first
            drop_in._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
        reason = shorten(" ".join(str(error).split()), 160)
        raise InputError(f"{path}: no IP-Adapter for this model ({reason})") from None
    projection = drop_in.encoder_hid_proj.image_projection_layers[0]
    processors = [p for p in drop_in.attn_processors.values() if isinstance(p, IPAdapterAttnProcessor2_0)]
    kinds = (
        embeddings.ImageProjection,
        embeddings.IPAdapterPlusImageProjection,
        embeddings.IPAdapterFullImageProjection,
    )
    if not isinstance(projection, kinds) or len(state["ip_adapter"]) != 2 * len(processors):
        raise InputError(f"{path}: an IP-Adapter for another model, or of the FaceID kind, which is not known here")
    for processor in processors:
        processor.scale = [scale]
    drop_in.encoder_hid_proj = nn.Identity()
    return drop_in.eval().requires_grad_(False), projection


def load_image_encoder(folder: Path) -> Any:
    """The transformers.CLIPVisionModelWithProjection in a folder, of the file's dtype. Raises InputError."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    path = folder / "config.json"
    raw, wanted = read_json(path), CLIPVisionModelWithProjection.__name__
    if raw.get("architectures") != [wanted]:
        raise InputError(f"{path} describes {shorten(str(raw.get('architectures')))}: a {wanted} is needed")
    settings = checked(raw, _VISION_FIELDS, path)
    if settings.get("hidden_act", "quick_gelu") not in {"quick_gelu", "gelu"}:
        raise InputError(f"{path}: hidden_act is {shorten(settings['hidden_act'])}: quick_gelu or gelu is needed")
    config = CLIPVisionConfig(**settings)
    if config.hidden_size % config.num_attention_heads or config.patch_size > config.image_size:
        raise InputError(f"{path}: heads must divide hidden_size, and patches be no larger than the image")
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    _load(model, folder, "model", _VISION_PREFIX)
    for module in model.modules():
        if "position_ids" in module._buffers:  # a constant, which is in no file of today
            module.position_ids = torch.arange(module.num_positions)[None]
    return model


def _load(network: nn.Module, folder: Path, stem: str, prefix: str = "") -> None:
    """Strictly, but `prefix` before a key may be there or not: that differs between versions of transformers."""
    tensors, source = read_weights(folder, stem)
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if prefix:
        found.pop("embeddings.position_ids", None)
    own = {key.removeprefix(prefix): key for key in network.state_dict()}
    load_state(network, {own.get(key, key): tensor for key, tensor in found.items()}, source)
    network.eval().requires_grad_(False)
