"""The linear layers quantised by torchao and bitsandbytes, where these are installed: pip install -e '.[quantised]'.

diffusers' own quantiser by bitsandbytes wants a GPU; here its layers are put in by hand, as that does it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TorchAoConfig
from diffusers import UNet2DConditionModel as Stock
from drop_in_pair import Unet, assert_same, draw, middle, pair, same
from torch import nn

from diffusion_unet import UNet2DConditionModel as Ours

bnb = pytest.importorskip("bitsandbytes")
quantization = pytest.importorskip("torchao.quantization")


def _replace_linears(unet: Unet, new: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)]:
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, new(layer).to("cpu"))  # which is when bitsandbytes quantises


def _int8(layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    new.load_state_dict(layer.state_dict())
    return new


def _nf4(layer: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
    new.weight, new.bias = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4"), layer.bias
    return new


def _kind(unet: Unet) -> str:
    weight = middle(unet).attn2.to_k.weight
    return f"{type(weight).__name__} of {weight.dtype}"


WAYS: dict[str, tuple[Callable[[Unet], Any], str]] = {
    "torchao int8": (lambda unet: quantization.quantize_(unet, quantization.Int8WeightOnlyConfig()), "Int8Tensor"),
    "bitsandbytes int8": (lambda unet: _replace_linears(unet, _int8), "torch.int8"),
    "bitsandbytes nf4": (lambda unet: _replace_linears(unet, _nf4), "torch.uint8"),
}


@pytest.mark.parametrize("way", WAYS)
def test_quantised_layers_draw_as_with_stock(way: str) -> None:
    quantise, kind = WAYS[way]
    stock, ours = pair()
    plain = draw(ours)
    for unet in (stock, ours):
        quantise(unet)
        assert kind in _kind(unet)
    assert_same(draw(ours), draw(stock))
    assert not same(draw(ours), plain)
    with ours.cached():
        assert_same(draw(ours), draw(stock))


def test_cached_notices_that_layers_are_quantised() -> None:
    stock, ours = pair()
    with ours.cached():
        draw(ours)
        for unet in (stock, ours):
            WAYS["torchao int8"][0](unet)
        assert_same(draw(ours), draw(stock))


def test_torchao_quantises_while_loading(tmp_path: Path) -> None:
    pair()[0].save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    stock, ours = (
        cls.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.float32) for cls in (Stock, Ours)
    )
    assert "Int8Tensor" in _kind(ours) and ours.native
    assert_same(draw(ours), draw(stock))
