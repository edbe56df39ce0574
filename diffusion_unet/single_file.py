"""A diffusers model folder as one file in the original layout, that of CompVis' `ldm` and Stability AI's `sgm`.

    model.diffusion_model.*          the U-Net: blocks are numbered through, whatever their level
    first_stage_model.*              the autoencoder: attention as 1x1 convolutions, the decoder's levels counted back
    cond_stage_model.transformer.*   SD 1.x: OpenAI's CLIP, as transformers names it
    cond_stage_model.model.*         SD 2.x: OpenCLIP, which keeps query, key and value in one matrix
    conditioner.embedders.N.*        SDXL: one of each, in this order (the refiner: OpenCLIP alone)

Such a file holds weights only. A reader that is given no configuration takes the rest (numbers of heads, activations,
the scale of latents, the noise schedule) from the released model that it recognises by keys and shapes. Of the two
layouts a text encoder gets the one of the code with its activation: CLIP's is quick_gelu, OpenCLIP's gelu.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import cast, write_safetensors
from .clip import load_model
from .codec import load_vae, vae_settings
from .config import UNetConfig
from .errors import InputError
from .unet import UNet
from .untrusted import read_json

Places = dict[str, str]  # a module or a parameter of the folder: its name in the file

PIPELINES = {  # model_index.json's class: is it of the XL kind?
    "StableDiffusionPipeline": False,
    "StableDiffusionImg2ImgPipeline": False,
    "StableDiffusionInpaintPipeline": False,
    "StableDiffusionInstructPix2PixPipeline": False,
    "StableDiffusionXLPipeline": True,
    "StableDiffusionXLImg2ImgPipeline": True,
    "StableDiffusionXLInpaintPipeline": True,
    "StableDiffusionXLInstructPix2PixPipeline": True,
}
CLIP, OPEN_CLIP = "quick_gelu", "gelu"  # the activation of each

# What the original code does not let one choose, or has no place for. Its 32 groups a norm are not among it: a model
# too narrow for them can still be read by stock diffusers, which is given the configuration.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "encoder_hid_dim": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0),
}

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.in_proj_weight": "attn.in_proj_weight",
    "self_attn.in_proj_bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

# The released models: widths, transformer blocks a level, width of the context; their names in ModelSpec where they
# predict epsilon, and v.
_ARCHITECTURES = {
    ((320, 640, 1280, 1280), 1, 768): ("stable-diffusion-v1",) * 2,
    ((320, 640, 1280, 1280), 1, 1024): ("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
    ((320, 640, 1280), (1, 2, 10), 2048): ("stable-diffusion-xl-v1-base",) * 2,
    ((384, 768, 1536, 1536), 4, 1280): ("stable-diffusion-xl-v1-refiner",) * 2,
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def write_single_file(
    folder: Path | str, path: Path | str, *, dtype: torch.dtype | None = None, variant: str | None = None
) -> Path:
    """Writes a model folder of Stable Diffusion 1.x, 2.x or XL as one `.safetensors` file, whole or not at all.

    folder: with a model_index.json, as diffusers' pipelines save it, or their inpainting and InstructPix2Pix relatives.
    dtype: of the weights written, None as they are; variant: the word in the names of the weight files to read.

    Weights are read as they are written: what is held in memory is what `dtype` or the layout changes, once.

    Returns `path`. Raises InputError, one line, for a model that the original code could not hold, a part that is
    missing or damaged, or a weight that does not fit in `dtype`; SaveError when it cannot be written.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a single file is named *.safetensors")
    parts, xl = _read_index(folder)
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    unet = UNet.from_pretrained(folder, subfolder="unet", variant=variant)
    _check_unet(unet.config, xl, folder / "unet")
    tensors = placed(unet.state_dict(), unet_places(unet.config), "model.diffusion_model.")
    tensors |= placed(*_read_vae(folder / "vae", variant), "first_stage_model.")
    encoders = [part for part in ("text_encoder", "text_encoder_2") if part in parts]
    for number, part in enumerate(encoders):
        prefix = f"conditioner.embedders.{number}." if xl else "cond_stage_model."
        known = ([OPEN_CLIP] if part == "text_encoder_2" else [CLIP]) if xl else [CLIP, OPEN_CLIP]
        tensors |= _read_text(folder / part, parts[part], known, prefix, variant)
    if xl and schedule.get("prediction_type") == "v_prediction":
        # Empty: ComfyUI and stable-diffusion.cpp take v from the name being there.
        marks = ["v_pred", "ztsnr"] if schedule.get("rescale_betas_zero_snr") else ["v_pred"]
        tensors |= {name: torch.zeros(0) for name in marks}
    header = {"format": "pt", **modelspec(unet.config, schedule, path.stem)}
    write_safetensors(path, cast(tensors, dtype, str(folder)), header)
    return path


def modelspec(config: UNetConfig, schedule: Mapping[str, Any], title: str) -> dict[str, str]:
    """The header of Stability AI's Model Metadata Standard 1.0.0 for a model of a released architecture; else {}.

    schedule: the scheduler_config.json; where it does not say what the network predicts, nothing is claimed.
    """
    kind = (config.block_out_channels, config.transformer_layers_per_block, config.cross_attention_dim)
    prediction = _PREDICTIONS.get(str(schedule.get("prediction_type")))
    if kind not in _ARCHITECTURES or prediction is None:
        return {}
    if config.in_channels != 4 or config.reverse_transformer_layers_per_block:
        return {}
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": _ARCHITECTURES[kind][prediction == "v"],
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "prediction_type": prediction,
    }
    if config.sample_size is not None:
        size = config.sample_size
        height, width = size if isinstance(size, tuple) else (size, size)
        values["resolution"] = f"{8 * width}x{8 * height}"
    return {f"modelspec.{key}": value for key, value in values.items()}


# --- where each weight goes ------------------------------------------------------------------------------------------


def unet_places(config: UNetConfig) -> Places:
    """The U-Net's modules. A level's blocks follow those of the level before; a downsampling is a block of its own, an
    upsampling the last layer of one."""
    places, row = dict(_UNET_ENDS), 1
    for i, level in enumerate(config.down_levels):
        for j in range(len(level.depths)):
            places |= _inside(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{row}.0", _UNET_RESNET)
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{row}.1"
            row += 1
        if level.resample:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{row}.0.op"
            row += 1
    for j in (0, 1):
        places |= _inside(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", _UNET_RESNET)
    places["mid_block.attentions.0"] = "middle_block.1"
    row = 0
    for i, level in enumerate(config.up_levels):
        for j in range(len(level.depths)):
            places |= _inside(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{row}.0", _UNET_RESNET)
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{row}.1"
            row += 1
        if level.resample:
            places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{row - 1}.{2 if any(level.depths) else 1}"
    return places


def vae_places(levels: int, layers: int) -> Places:
    """The modules of an autoencoder with `layers` residual blocks a level going down, and one more going up."""
    places = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        places |= _inside(side, side, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        places |= _inside(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", _VAE_ATTENTION)
        for j in (0, 1):
            places |= _inside(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", _VAE_RESNET)
    for i in range(levels):
        down, up, place = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}", f"{i}"
        for j in range(layers + 1):
            places |= _inside(f"{down}.resnets.{j}", f"encoder.down.{place}.block.{j}", _VAE_RESNET)
            places |= _inside(f"{up}.resnets.{j}", f"decoder.up.{place}.block.{j}", _VAE_RESNET)
        places[f"{down}.downsamplers.0"] = f"encoder.down.{place}.downsample"
        places[f"{up}.upsamplers.0"] = f"decoder.up.{place}.upsample"
    return places


def open_clip_places(layers: int) -> Places:
    """The modules of a CLIP text transformer whose query, key and value are one already."""
    places = dict(_OPEN_CLIP_ENDS)
    for i in range(layers):
        places |= _inside(f"encoder.layers.{i}", f"transformer.resblocks.{i}", _OPEN_CLIP_LAYER)
    return places


def _inside(module: str, place: str, children: Places) -> Places:
    return {f"{module}.{name}": f"{place}.{other}" for name, other in children.items()}


def placed(tensors: Mapping[str, Tensor], places: Places, prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix` and the names that `places` gives them, or a module that holds them."""
    found = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        splits = ((".".join(parts[:n]), parts[n:]) for n in range(len(parts), 0, -1))
        place = next((".".join([places[module], *rest]) for module, rest in splits if module in places), None)
        if place is None:
            raise InputError(f"{key} has no place in the original layout: export the folder layout instead")
        found[prefix + place] = tensor
    return found


# --- the parts of the folder -----------------------------------------------------------------------------------------


def _read_index(folder: Path) -> tuple[dict[str, str], bool]:
    """The class of each part that is written, and whether they are SDXL's."""
    path = folder / "model_index.json"
    index = read_json(path)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise InputError(f"{path}: a {ascii(name)[:60]} has no original layout; these have: {', '.join(PIPELINES)}")
    xl = PIPELINES[name]
    wanted = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    if xl:
        wanted["text_encoder_2"] = "CLIPTextModelWithProjection"
        if index.get("text_encoder", [None, None]) == [None, None]:  # the refiner
            del wanted["text_encoder"]
    for part, kind in wanted.items():
        given = index.get(part)
        if not isinstance(given, list) or given[-1:] != [kind]:
            raise InputError(f"{path}: {part} is {ascii(given)[:80]}; the original layout holds a {kind} only")
    return wanted, xl


def _check_unet(config: UNetConfig, xl: bool, folder: Path) -> None:
    fixed = _UNET_FIXED | {"addition_embed_type": ("text_time",) if xl else (None,)}
    fixed["time_embedding_dim"] = (None, 4 * config.block_out_channels[0])
    _check(config.to_diffusers(), fixed, folder)
    for name in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(getattr(config, name), int):
            raise InputError(f"{folder}: {name} is not one number, and the original layout has one for all levels")


def _check(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], folder: Path) -> None:
    for name, values in fixed.items():
        if config.get(name, values[0]) not in values:
            raise InputError(
                f"{folder}: {name} is {ascii(config[name])[:80]}, and the original layout knows only {values[0]!r};"
                " export the folder layout instead"
            )


def _read_vae(folder: Path, variant: str | None) -> tuple[dict[str, Tensor], Places]:
    """An autoencoder's tensors, its attention as 1x1 convolutions, and their places."""
    settings = vae_settings(folder / "config.json")
    _check(settings, _VAE_FIXED, folder)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if any(block != kind for block in settings.get(name, ())):
            raise InputError(f"{folder}: {name} is {settings[name]}, and the original layout knows only {kind}")
    vae = load_vae(folder, variant)
    tensors = vae.state_dict()
    matrices = [key for key in tensors if ".attentions." in key and tensors[key].ndim == 2]
    tensors |= {key: tensors[key][:, :, None, None] for key in matrices}
    return tensors, vae_places(len(vae.config.block_out_channels), vae.config.layers_per_block)


def _read_text(folder: Path, kind: str, known: list[str], prefix: str, variant: str | None) -> dict[str, Tensor]:
    """A text encoder's tensors under their names in the file."""
    model: Any = load_model(folder, variant, projection=kind == "CLIPTextModelWithProjection")
    activation = model.config.hidden_act
    if activation not in known:
        raise InputError(f"{folder}: hidden_act is {activation}, and the original code has {' or '.join(known)} there")
    tensors = {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    tensors.pop("embeddings.position_ids", None)
    if activation == CLIP:
        length = model.config.max_position_embeddings
        tensors["embeddings.position_ids"] = torch.arange(length)[None]  # [1, L], as in the released files
        return placed(tensors, {key: key for key in tensors}, f"{prefix}transformer.text_model.")
    layers = model.config.num_hidden_layers
    for i in range(layers):
        for parameter in ("weight", "bias"):
            parts = [tensors.pop(f"encoder.layers.{i}.self_attn.{name}_proj.{parameter}") for name in "qkv"]
            tensors[f"encoder.layers.{i}.self_attn.in_proj_{parameter}"] = torch.cat(parts)
    if "text_projection.weight" in tensors:  # the original multiplies from the right
        tensors["text_projection.weight"] = tensors["text_projection.weight"].T.contiguous()
    return placed(tensors, open_clip_places(layers), f"{prefix}model.")
