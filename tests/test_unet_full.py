"""The released networks at full width: `pytest -m slow tests/test_unet_full.py` (16 GB of memory, some minutes)."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from families import FAMILIES, inputs, stock_call

from diffusion_unet.config import UNetConfig
from diffusion_unet.unet import UNet

pytestmark = pytest.mark.slow


def shared_pair(name: str) -> tuple[UNet2DConditionModel, UNet]:
    """The stock class and ours over one set of random tensors."""
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(FAMILIES[name])
        unet = UNet(UNetConfig.from_diffusers(FAMILIES[name]))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, value in unet.state_dict().items():
        spread = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
        centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        tensors[key] = torch.empty(value.shape).normal_(centre, spread, generator=generator)
    stock.load_state_dict(tensors, assign=True)
    unet.load_state_dict(tensors, assign=True)
    return stock, unet


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_stable_diffusion_15_forward_and_backward() -> None:
    stock, unet = shared_pair("sd15")
    values = inputs(FAMILIES["sd15"], height=32, width=32, batch=1)
    weight = torch.linspace(-1, 1, 4 * 32 * 32).view(1, 4, 32, 32)
    gradients, outputs = [], []
    for call, model in ((stock_call, stock), (lambda m, v: m(**v), unet)):
        model.zero_grad()
        output = call(model, values)
        (output * weight).sum().backward()
        outputs.append(output.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_close(outputs[1], outputs[0])
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        assert_close(ours, theirs)


def test_sdxl_forward() -> None:
    stock, unet = shared_pair("sdxl")
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    values = inputs(FAMILIES["sdxl"], height=32, width=32, batch=1)
    with torch.no_grad():
        assert_close(unet(**values), stock_call(stock, values))
