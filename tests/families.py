"""The U-Net configurations of the released families, as their `unet/config.json` spell them, and narrow ones of the
same structure that run within milliseconds."""

from typing import Any

import torch
from torch import Tensor

CROSS_DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
CROSS_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3

SD15: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": CROSS_DOWN,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": CROSS_UP,
}
SD21 = {
    **SD15,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = {
    **SD21,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280],
    "class_embeddings_concat": False,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
REFINER = {
    **SDXL,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "sd21": SD21,
    "sdxl": SDXL,
    "refiner": REFINER,
    "inpainting": {**SD15, "in_channels": 9},
    "sdxl-inpainting": {**SDXL, "in_channels": 9},
    "instruct-pix2pix": {**SD15, "in_channels": 8},
    "depth": {**SD21, "in_channels": 5},
    "upscaler": {
        **SD15,
        "block_out_channels": [256, 512, 512, 1024],
        "cross_attention_dim": 1024,
        "down_block_types": CROSS_DOWN[::-1],
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "up_block_types": CROSS_UP[::-1],
        "use_linear_projection": True,
    },
    "lcm": {**SD15, "time_cond_proj_dim": 256},
    "unclip": {**SD21, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "kolors": {
        **SDXL,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": 5632,
    },
    "ssd-1b": {
        **SDXL,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
}  # fmt: skip

_WIDTHS = {2816: 64, 2560: 56, 5632: 72, 2048: 12}  # pooled text and 6 (refiner: 5) sizes of 8; unCLIP's image vector


def narrow(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A configuration of a sixteenth of the width, and of at most three transformer blocks in a row."""
    small = {
        **config,
        "block_out_channels": [width // 16 for width in config["block_out_channels"]],
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
        "sample_size": 8,
    }
    if config["attention_head_dim"] == 8:
        small["attention_head_dim"] = 4
    if config.get("transformer_layers_per_block") == [1, 2, 10]:
        small["transformer_layers_per_block"] = [1, 2, 3]
    if "projection_class_embeddings_input_dim" in config:
        small["projection_class_embeddings_input_dim"] = _WIDTHS[config["projection_class_embeddings_input_dim"]]
    if "addition_time_embed_dim" in config:
        small["addition_time_embed_dim"] = 8
    if "encoder_hid_dim" in config:
        small["encoder_hid_dim"] = 20
    if "time_cond_proj_dim" in config:
        small["time_cond_proj_dim"] = 10
    if "num_class_embeds" in config:
        small["num_class_embeds"] = 11
    return {**small, **changes}


_BASE = narrow(SD15, block_out_channels=[16, 32], down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
               up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], attention_head_dim=4)  # fmt: skip

NARROW: dict[str, dict[str, Any]] = {name: narrow(config) for name, config in FAMILIES.items()} | {
    "unconditional": {
        **_BASE,
        "cross_attention_dim": [None, None],
        "mid_block_type": "UNetMidBlock2D",
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    },
    "self-attention": {
        **_BASE,
        "cross_attention_dim": [None, None],
        "num_class_embeds": 5,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    },
    "no-mid-block": {**_BASE, "mid_block_type": None},
    "plain-mid-block": {**_BASE, "mid_block_type": "UNetMidBlock2D"},
    "scale-shift": {**_BASE, "resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 1.4},
    "timestep-classes": {**_BASE, "class_embed_type": "timestep"},
    "identity-classes": {**_BASE, "class_embed_type": "identity"},
    "simple-classes": {**_BASE, "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6},
    "concatenated-classes": {**_BASE, "num_class_embeds": 5, "class_embeddings_concat": True},
    "asymmetric": {
        **_BASE,
        "layers_per_block": [1, 3],
        "cross_attention_dim": [24, 24],
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [2, 1],
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "old-conventions": {
        **_BASE,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "center_input_sample": True,
        "only_cross_attention": True,
        "mid_block_only_cross_attention": False,
    },
    "other-sizes": {
        **_BASE,
        "time_embedding_dim": 40,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "block_out_channels": [24, 40],
        "norm_eps": 1e-3,
        "act_fn": "swish",
    },
}


def inputs(config: dict[str, Any], *, batch: int = 2, height: int = 8, width: int = 8, seed: int = 0,
           mask: bool = True) -> dict[str, Tensor]:  # fmt: skip
    """Random inputs for a configuration, under the argument names of `UNet.forward`, in float32."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    values = {
        "x": randn(batch, config["in_channels"], height, width),
        "timestep": torch.linspace(0, 977.25, batch) if batch > 1 else torch.tensor([431.5]),
    }
    context_width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    if isinstance(context_width, int):
        values["context"] = randn(batch, 7, context_width)
        if mask:
            values["context_mask"] = torch.arange(7) < torch.tensor([[5], [7]] * batch)[:batch]
    elif context_width[0] is not None:
        values["context"] = randn(batch, 7, context_width[0])
    if config.get("class_embeddings_concat") or config.get("num_class_embeds"):
        values["class_labels"] = torch.arange(batch) + 1
    elif config.get("class_embed_type") == "timestep":
        values["class_labels"] = 100.0 * torch.arange(1, batch + 1)
    elif config.get("class_embed_type") == "identity":
        values["class_labels"] = randn(batch, 4 * config["block_out_channels"][0])
    elif config.get("class_embed_type"):
        values["class_labels"] = randn(batch, config["projection_class_embeddings_input_dim"])
    if config.get("addition_embed_type"):
        ids = 5 if config["projection_class_embeddings_input_dim"] in (56, 2560) else 6
        step = config["addition_time_embed_dim"]
        values["pooled"] = randn(batch, config["projection_class_embeddings_input_dim"] - ids * step)
        values["time_ids"] = torch.arange(batch * ids).reshape(batch, ids) * 32.0
    if config.get("time_cond_proj_dim"):
        values["guidance"] = randn(batch, config["time_cond_proj_dim"])
    return values


def cast(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point inputs in another precision; timesteps stay as they are."""
    keep = ("timestep", "time_ids")
    return {k: v.to(dtype) if v.is_floating_point() and k not in keep else v for k, v in values.items()}


def stock_call(stock: torch.nn.Module, values: dict[str, Any]) -> Tensor:
    """diffusers' `UNet2DConditionModel` on the same inputs."""
    added = {"text_embeds": values["pooled"], "time_ids": values["time_ids"]} if "pooled" in values else None
    adapters = values.get("adapter_residuals")
    return stock(
        values["x"],
        values["timestep"],
        values.get("context"),
        class_labels=values.get("class_labels"),
        timestep_cond=values.get("guidance"),
        encoder_attention_mask=values.get("context_mask"),
        added_cond_kwargs=added,
        down_block_additional_residuals=values.get("down_residuals"),
        mid_block_additional_residual=values.get("mid_residual"),
        down_intrablock_additional_residuals=None if adapters is None else [a.clone() for a in adapters],
        return_dict=False,
    )[0]
