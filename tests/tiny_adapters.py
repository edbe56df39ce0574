"""A tiny model to be adapted, of Stable Diffusion's and of SDXL's kind, and the stock pipelines of the same weights."""

import copy
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as Stock
from drop_in_pair import pipeline
from families import inputs, stock_call
from tiny_pipelines import CONTEXT_WIDTH, LENGTH, POOLED_WIDTH, SD, XL, euler, text_encoder, tokenizer
from torch import Tensor, nn

from diffusion_unet.codec import PixelCodec
from diffusion_unet.conditioning import TextEncoder
from diffusion_unet.config import UNetConfig
from diffusion_unet.model import DiffusionModel
from diffusion_unet.prompts import DualTextEncoder
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet

CAPTIONS = ["a red boot", "blue bag"]
PIXELS = {"in_channels": 3, "out_channels": 3}
RGB, RGB_XL = SD | PIXELS, XL | PIXELS


def fresh(make: Any, *arguments: Any) -> Any:
    """A copy of its own: adapters are put into it."""
    return copy.deepcopy(make(*arguments))


def stock_unet(config: dict[str, Any]) -> Stock:
    torch.manual_seed(0)
    return Stock(**{key: value for key, value in config.items() if not key.startswith("_")}).eval()


def core(config: dict[str, Any]) -> UNet:
    unet = UNet(UNetConfig.from_diffusers(config))
    unet.load_state_dict(stock_unet(config).state_dict())
    return unet.eval()


def tiny() -> DiffusionModel:
    text = TextEncoder(fresh(tokenizer), fresh(text_encoder))
    return DiffusionModel(core(RGB), NoiseSchedule.scaled_linear(), text, PixelCodec(3, 0.0, 1.0))


def tiny_xl() -> Any:
    first = TextEncoder(fresh(tokenizer), fresh(text_encoder, CONTEXT_WIDTH - POOLED_WIDTH))
    second = TextEncoder(fresh(tokenizer), fresh(text_encoder, POOLED_WIDTH, POOLED_WIDTH))
    text = DualTextEncoder(first, second)
    return DiffusionModel(core(RGB_XL), NoiseSchedule.scaled_linear(), text, PixelCodec(3, 0.0, 1.0))


def stock_pipeline() -> Any:
    return pipeline(stock_unet(RGB), text_encoder=fresh(text_encoder), tokenizer=fresh(tokenizer))


def stock_xl_pipeline() -> Any:
    first, second = fresh(text_encoder, CONTEXT_WIDTH - POOLED_WIDTH), fresh(text_encoder, POOLED_WIDTH, POOLED_WIDTH)
    parts = {"text_encoder": first, "text_encoder_2": second, "tokenizer": fresh(tokenizer)}
    parts |= {"tokenizer_2": fresh(tokenizer), "scheduler": euler(), "vae": None, "add_watermarker": False}
    return StableDiffusionXLPipeline(unet=stock_unet(RGB_XL), **parts)


def trained(*modules: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for module in modules for name, p in module.named_parameters() if p.requires_grad}


def shaken(*modules: nn.Module, by: float = 0.1) -> None:
    """As after a training: no trained number is where it began."""
    generator = torch.Generator().manual_seed(7)
    for parameter in trained(*modules).values():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def predict(unet: nn.Module, config: dict[str, Any] = RGB) -> Tensor:
    values = inputs(config, mask=False)
    return unet(**values) if isinstance(unet, UNet) else stock_call(unet, values)


@torch.no_grad()
def read(model: nn.Module, captions: list[str] = CAPTIONS) -> Tensor:
    """The last hidden state of the captions, [B, L, D]."""
    ids = tokenizer()(captions, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    return model(ids).last_hidden_state


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
