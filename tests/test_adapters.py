"""LoRA and DoRA beside diffusers' own: in the stock pipelines a file that is written here does what was trained."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from families import SDXL, inputs
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_adapters import (
    CAPTIONS,
    RGB,
    RGB_XL,
    assert_same,
    predict,
    read,
    shaken,
    stock_pipeline,
    stock_unet,
    stock_xl_pipeline,
    tiny,
    tiny_xl,
    trained,
)
from torch import nn

from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.unet import UNet
from training.adapters import LORA_FILE, add_lora, original_name, save_lora
from training.config import AdapterConfig

# One of each kind of layer there is; the last three are a text encoder's.
EVERYWHERE = ("to_q", "attn2.to_k", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2")
EVERYWHERE += ("time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "linear_1", "q_proj", "out_proj", "fc1")
SAMPLERS = ("downsamplers.0.conv", "upsamplers.0.conv")


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_begins_as_the_model_and_is_all_that_is_trained(kind: Any) -> None:
    model = tiny()
    assert model.text is not None
    before, words = predict(model.unet), read(model.text.model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    add_lora(model, AdapterConfig(kind=kind, rank=2, alpha=5.0, target_modules=EVERYWHERE), text=True, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(predict(model.unet), before)
    assert torch.equal(read(model.text.model), words)
    names = trained(model.unet, model.text)
    assert names and all(".lora_" in name and parameter.dtype == torch.float32 for name, parameter in names.items())
    shaken(model.unet, model.text)
    assert not torch.allclose(predict(model.unet), before, atol=1e-3)
    assert not torch.allclose(read(model.text.model), words, atol=1e-3)


def test_the_seed_alone_decides_the_first_values() -> None:
    values = []
    for state, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(state)
        model = tiny()
        torch.manual_seed(state)
        add_lora(model, AdapterConfig(rank=2), text=True, seed=seed)
        assert model.text is not None
        values.append(torch.cat([parameter.flatten() for parameter in trained(model.unet, model.text).values()]))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])


def test_the_text_encoder_is_left_alone_unless_it_is_asked_for() -> None:
    model = tiny()
    add_lora(model, AdapterConfig(rank=2), text=False, seed=0)
    assert model.text is not None
    assert not trained(model.text)
    ends = {name.split(".lora_")[0].split("attn")[1][2:] for name in trained(model.unet)}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}


def test_every_adapter_of_sdxl_gets_a_gradient() -> None:
    model = tiny_xl()
    add_lora(
        model, AdapterConfig(rank=2, target_modules=("to_k", "fc1", "q_proj", "text_projection")), text=True, seed=1
    )
    shaken(model.unet, model.text)
    condition = model.text.encode(CAPTIONS)
    values = {key: value for key, value in inputs(RGB_XL, mask=False).items() if key not in ("context", "pooled")}
    model.unet(**values, context=condition.context, pooled=condition.pooled).square().mean().backward()
    names = trained(model.unet, model.text)
    assert [name for name, parameter in names.items() if parameter.grad is None or not parameter.grad.any()] == []
    assert {name.split(".")[0] for name in trained(model.text)} == {"first", "second"}


def test_a_frozen_model_in_bfloat16_trains_its_adapter_in_float32() -> None:
    model = tiny()
    model.unet.to(torch.bfloat16)
    add_lora(model, AdapterConfig(kind="dora", rank=2, target_modules=("to_q", "conv1")), text=False, seed=0)
    shaken(model.unet)
    values = {key: value.bfloat16() if key != "timestep" else value for key, value in inputs(RGB, mask=False).items()}
    model.unet(**values).float().square().mean().backward()
    assert all(parameter.dtype == torch.float32 for parameter in trained(model.unet).values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained(model.unet).values())


CASES = {
    "lora": ("diffusers", AdapterConfig(rank=3, target_modules=EVERYWHERE)),
    "alpha": ("diffusers", AdapterConfig(rank=2, alpha=5.0)),
    "dora": ("diffusers", AdapterConfig(kind="dora", rank=2, alpha=3.0, target_modules=EVERYWHERE)),
    "only-fc1": ("diffusers", AdapterConfig(rank=2, target_modules=("to_q", "fc1"))),
    "kohya": ("kohya", AdapterConfig(rank=2, alpha=0.5, target_modules=EVERYWHERE)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_stock_pipeline_predicts_with_the_file_what_was_trained(case: str, tmp_path: Path) -> None:
    layout, config = CASES[case]
    model, pipe = tiny(), stock_pipeline()
    assert model.text is not None
    assert_same(predict(pipe.unet), predict(model.unet))
    add_lora(model, config, text=True, seed=1)
    shaken(model.unet, model.text)
    path = save_lora(model, tmp_path / "out", layout=layout, metadata={"made_by": "a test"})  # type: ignore[arg-type]
    assert path == tmp_path / "out" / LORA_FILE
    assert header(path)["made_by"] == "a test"
    before, words = predict(pipe.unet), read(pipe.text_encoder)
    pipe.load_lora_weights(tmp_path / "out")
    assert_same(predict(pipe.unet), predict(model.unet))
    assert_same(read(pipe.text_encoder), read(model.text.model))
    assert not torch.allclose(predict(pipe.unet), before, atol=1e-3)
    assert not torch.allclose(read(pipe.text_encoder), words, atol=1e-3)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_the_stock_sdxl_pipeline_does_too(layout: Any, tmp_path: Path) -> None:
    model, pipe = tiny_xl(), stock_xl_pipeline()
    targets = (*EVERYWHERE, *SAMPLERS, "linear_2", "text_projection")
    add_lora(model, AdapterConfig(rank=2, alpha=5.0, target_modules=targets), text=True, seed=1)
    shaken(model.unet, model.text)
    path = save_lora(model, tmp_path, layout=layout)
    before = predict(pipe.unet, RGB_XL)
    pipe.load_lora_weights(tmp_path)
    assert_same(predict(pipe.unet, RGB_XL), predict(model.unet, RGB_XL))
    assert not torch.allclose(predict(pipe.unet, RGB_XL), before, atol=1e-3)
    assert_same(read(pipe.text_encoder), read(model.text.first.model))
    assert_same(read(pipe.text_encoder_2), read(model.text.second.model))
    starts = {key.split("." if layout == "diffusers" else "_text_")[0] for key in load_file(path)}
    assert starts >= ({"unet", "text_encoder", "text_encoder_2"} if layout == "diffusers" else {"lora_te1", "lora_te2"})


def test_the_keys_are_those_of_stock(tmp_path: Path) -> None:
    model, stock = tiny(), stock_unet(RGB)
    targets = ["to_q", "conv1"]
    add_lora(model, AdapterConfig(kind="dora", rank=2, target_modules=tuple(targets)), text=True, seed=0)
    stock.add_adapter(LoraConfig(r=2, target_modules=targets, use_dora=True))
    saved = load_file(save_lora(model, tmp_path))
    expected = {f"unet.{key}": value.shape for key, value in get_peft_model_state_dict(stock).items()}
    assert {key: value.shape for key, value in saved.items() if key.startswith("unet.")} == expected
    text = "text_encoder.text_model.encoder.layers.1.self_attn.out_proj"
    assert {f"{text}.lora_linear_layer.down.weight", f"{text}.lora_magnitude_vector.weight"} <= saved.keys()
    settings = json.loads(header(tmp_path / LORA_FILE)["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == 2
    assert settings["unet.use_dora"] is settings["text_encoder.use_dora"] is True


def test_kohya_keys_and_half_precision(tmp_path: Path) -> None:
    model = tiny()
    add_lora(model, AdapterConfig(rank=2, alpha=0.3), text=True, seed=0)
    path = save_lora(model, tmp_path, layout="kohya", dtype=torch.float16)
    saved = load_file(path)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert saved[f"{layer}.lora_down.weight"].dtype == torch.float16
    assert saved[f"{layer}.lora_up.weight"].shape == (16, 2)
    assert float(saved["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"]) == pytest.approx(0.3, rel=1e-3)
    assert {"ss_network_dim": "2", "ss_network_alpha": "0.3"}.items() <= header(path).items()


def test_kohya_dora_is_that_of_lycoris(tmp_path: Path) -> None:
    """W' = dora_scale (W + alpha / rank up down) / its norm over each output."""
    model, stock = tiny(), stock_unet(RGB)
    targets = ("to_q", "conv1", "conv_shortcut")
    add_lora(model, AdapterConfig(kind="dora", rank=2, alpha=3.0, target_modules=targets), text=False, seed=1)
    shaken(model.unet)
    saved = load_file(save_lora(model, tmp_path, layout="kohya"))
    modules = {f"lora_unet_{name.replace('.', '_')}": module for name, module in stock.named_modules()}
    for name in {key.split(".")[0] for key in saved}:
        up, down, alpha = (saved[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        weight = modules[name].weight.data
        whole = weight + float(alpha) / 2 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        norm = whole.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        assert saved[f"{name}.dora_scale"].shape == norm.shape
        weight.copy_(saved[f"{name}.dora_scale"] * whole / norm)
    assert_same(predict(stock), predict(model.unet))


def test_every_layer_of_sdxl_has_the_name_that_stock_reads_back() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_diffusers(SDXL))
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    flat = {name: "lora_unet_" + original_name(name, unet).replace(".", "_") for name in names}
    assert len(set(flat.values())) == len(names)
    assert flat["down_blocks.1.attentions.0.proj_in"] == "lora_unet_input_blocks_4_1_proj_in"
    assert flat["mid_block.attentions.0.proj_in"] == "lora_unet_middle_block_1_proj_in"
    assert flat["up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"
    for name, key in flat.items():
        ends = ("lora_down.weight", "lora_up.weight")
        written = {f"{key}.{end}": torch.zeros(1) for end in ends}
        mapped = _maybe_map_sgm_blocks_to_diffusers(written, SimpleNamespace(layers_per_block=2))
        read_back, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
        assert f"unet.{name}.lora_A.weight" in convert_unet_state_dict_to_peft(read_back), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ("to_q", "to_x")}, "target_modules: no linear layer or convolution .* ends in 'to_x'"),
        ({"target_modules": ("norm1",)}, "no linear layer or convolution of the unet or text_encoder"),
        ({"text": None}, "has no text encoder to adapt"),
        ({"peft": None}, r"pip install 'diffusion-unet\[lora\]'"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny()
    if "text" in change:
        model.text = None
    if "peft" in change:
        monkeypatch.setitem(sys.modules, "peft", None)
    config = AdapterConfig(**{key: value for key, value in change.items() if key == "target_modules"})
    with pytest.raises(InputError, match=message):
        add_lora(model, config, text=True, seed=0)
    with pytest.raises(InputError, match="no adapter to save"):
        save_lora(model, tmp_path)


def test_an_overflow_is_no_file(tmp_path: Path) -> None:
    model = tiny()
    add_lora(model, AdapterConfig(rank=2), text=False, seed=0)
    next(iter(trained(model.unet).values())).data += 1e6
    with pytest.raises(InputError, match=r"does not fit in torch\.float16"):
        save_lora(model, tmp_path, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
