"""A tiny network of both classes with the same weights, and how their predictions are compared."""

from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as Stock
from families import SD15, inputs, narrow
from torch import Tensor, nn

from diffusion_unet import UNet2DConditionModel as Ours

TINY = narrow(
    SD15,
    block_out_channels=[16, 32],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    sample_size=64,  # the pipeline warns of a smaller one
)
INPUTS = inputs(TINY)
ATTENTIONS = 8  # two in each transformer block: one going down, one in the middle, two going up
Unet = Stock | Ours


def pair(**changes: Any) -> tuple[Stock, Ours]:
    torch.manual_seed(0)
    stock, ours = Stock.from_config(TINY | changes).eval(), Ours.from_config(TINY | changes).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def random_pair(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Stock, Ours]:
    """The stock class and ours with the same weights, random everywhere (norms and biases too), in eval mode."""
    torch.manual_seed(seed)
    stock = Stock.from_config(config)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    ours = Ours.from_config(config)
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype).eval(), ours.to(dtype).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@torch.no_grad()
def draw(unet: nn.Module, x: Tensor = INPUTS["x"], **arguments: Any) -> Tensor:
    """The prediction for `INPUTS`, but for another x."""
    return unet(x, INPUTS["timestep"], INPUTS["context"], **arguments).sample


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def assert_same(ours: Tensor, stock: Tensor) -> None:
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def middle(unet: nn.Module) -> Any:
    """The transformer block in the middle."""
    return unet.mid_block.attentions[0].transformer_blocks[0]


def pipeline(unet: nn.Module, **components: Any) -> StableDiffusionPipeline:
    """Without what is not among `components`: for loading and unloading, not for drawing."""
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"]) | components
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
