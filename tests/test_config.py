"""U-Net configurations: what is read, what is written, what is refused and how."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from families import FAMILIES, NARROW, SD15

from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError


@pytest.mark.parametrize("name", NARROW)
def test_round_trip_through_diffusers_spelling(name: str) -> None:
    config = UNetConfig.from_diffusers(NARROW[name])
    written = config.to_diffusers()
    assert UNetConfig.from_diffusers(written) == config
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(written)
        original = UNet2DConditionModel.from_config(NARROW[name])
    assert {k: v.shape for k, v in stock.state_dict().items()} == {k: v.shape for k, v in original.state_dict().items()}
    for key, value in NARROW[name].items():
        if key in written and value is not None:
            assert stock.config[key] == (written[key]) == value, key


def test_defaults_are_those_of_the_stock_class() -> None:
    with torch.device("meta"):
        stock = UNet2DConditionModel().config
    for key, value in UNetConfig().to_diffusers().items():
        if key != "_class_name":
            assert (list(stock[key]) if isinstance(stock[key], tuple) else stock[key]) == value, key


def test_configurations_of_2022_lack_keys_and_hold_nulls_and_stray_keys() -> None:
    nulls: dict[str, Any] = {"only_cross_attention": None, "use_linear_projection": None, "upcast_attention": None}
    nulls |= {"resnet_time_scale_shift": None, "dual_cross_attention": None, "transformer_layers_per_block": None}
    nulls |= {"conv_in_kernel": None, "class_embeddings_concat": None, "attention_type": None}
    strays = {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 250000, "update_after_step": 0}
    config = UNetConfig.from_diffusers({**SD15, **nulls, **strays}, ignore_unknown=True)
    assert config == UNetConfig.from_diffusers(SD15)
    with pytest.raises(InputError, match="decay is not a field of a U-Net; inv_gamma is not a field"):
        UNetConfig.from_diffusers({**SD15, **strays})


def test_null_mid_block_means_no_mid_block() -> None:
    assert UNetConfig.from_diffusers({**SD15, "mid_block_type": None}).mid_block_type is None


def test_one_error_lists_every_unsupported_field() -> None:
    unsupported = {
        "down_block_types": ["KDownBlock2D"] * 4,
        "dual_cross_attention": True,
        "attention_type": "gated",
        "encoder_hid_dim": 4,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "text",
        "time_embedding_type": "fourier",
        "act_fn": "gelu",
        "resnet_skip_time_act": True,
        "cross_attention_norm": "layer_norm",
    }
    with pytest.raises(InputError) as error:
        UNetConfig.from_diffusers({**SD15, **unsupported})
    for key in unsupported:
        assert key in str(error.value) or key == "encoder_hid_dim"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 0}, "in_channels is 0, and must be a whole number above 0"),
        ({"in_channels": True}, "in_channels is True"),
        ({"in_channels": "4"}, "in_channels is '4'"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"block_out_channels": []}, r"block_out_channels is \[\]"),
        ({"block_out_channels": 32}, "block_out_channels is 32, and must be a list"),
        ({"block_out_channels": "320"}, "block_out_channels is '320'"),
        ({"block_out_channels": [320, 640]}, "down_block_types has 4 entries for 2 levels"),
        ({"attention_head_dim": [8, 8]}, "num_attention_heads has 2 entries for 4 levels"),
        ({"norm_num_groups": 7}, "norm_num_groups 7 does not divide the width 320"),
        ({"attention_head_dim": 7}, "7 attention heads .* do not divide 320"),
        ({"num_attention_heads": 8}, "num_attention_heads is set"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim is needed"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim is needed"),
        ({"class_embeddings_concat": True}, "num_class_embeds or class_embed_type is needed"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim is needed"),
        ({"transformer_layers_per_block": [1, [1, 2], 1, 1]}, "reverse_transformer_layers_per_block is needed"),
        (
            {"reverse_transformer_layers_per_block": [1, [2, 2], 1, 1]},
            "a level of 3 layers has transformer depths for 2 only",
        ),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.5}, "dropout is -0.5"),
        ({"mid_block_type": ["UNetMidBlock2D"]}, "mid_block_type is"),
        ({"down_block_types": [{}] * 4}, "down_block_types is"),
        ({"cross_attention_dim": [None, 768, 768, 768]}, "cross_attention_dim is null where"),
        ({"block_out_chanels": [1]}, "block_out_chanels is not a field"),
    ],
)
def test_bad_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNetConfig.from_diffusers({**SD15, **change})


def test_frozen_and_hashable() -> None:
    config = UNetConfig.from_diffusers(FAMILIES["sdxl"])
    assert hash(config) == hash(UNetConfig.from_diffusers(FAMILIES["sdxl"]))
    with pytest.raises(AttributeError):
        config.in_channels = 9  # type: ignore[misc]
