"""Diffusers' pipelines at a width where a picture takes milliseconds: their parts are made here, from seeds.

A `Case` is a pipeline without its U-Net, and what to ask of it. Pictures are 16 pixels and latents 8; the VAE halves.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from families import SD15, SD21, SDXL, narrow
from torch import Tensor, nn

from diffusion_unet.conditioning import train_tokenizer

PROMPT, OTHER_PROMPT = "a red boot", "blue bag"
LENGTH = 12  # tokens of a prompt
SIZE = 16

_TWO_LEVELS = {"block_out_channels": [16, 32], "layers_per_block": 1}
SD = narrow(SD15, **_TWO_LEVELS, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])  # fmt: skip
SD2 = {**SD, **{key: SD21[key] for key in ("upcast_attention", "use_linear_projection")}, "attention_head_dim": [2, 4]}
XL = narrow(SDXL, **_TWO_LEVELS, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], attention_head_dim=[2, 4],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], transformer_layers_per_block=[1, 2])  # fmt: skip
XL_THREE_LEVELS = narrow(SDXL, block_out_channels=[16, 32, 32], layers_per_block=1, attention_head_dim=[2, 4, 4],
                         transformer_layers_per_block=1)  # fmt: skip
CONTEXT_WIDTH, POOLED_WIDTH = SD["cross_attention_dim"], 16


@dataclass(frozen=True)
class Case:
    """A pipeline: `parts` makes all of it but the U-Net, for which it may be made (a ControlNet is)."""

    pipeline: str | type  # a name in diffusers, or the class
    unet: dict[str, Any]
    parts: Callable[[Any], dict[str, Any]]
    call: dict[str, Any]
    changes: tuple[dict[str, Any], ...] = ({"prompt": OTHER_PROMPT},)  # each gives another picture

    def assemble(self, unet: nn.Module) -> Any:
        cls: Any = getattr(diffusers, self.pipeline) if isinstance(self.pipeline, str) else self.pipeline
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # AnimateDiff XL makes new weights for the layers that it forgets to copy
            pipe = cls(unet=unet, **self.parts(unet))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, **changes: Any) -> Tensor:
        """What the pipeline gives, always from the same noise."""
        call = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, **self.call, **changes}
        return torch.as_tensor(pipe(**call, return_dict=False)[0])


def pair(config: dict[str, Any], cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """diffusers' U-Net, and one of `cls` with the same weights."""
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    stock = seeded(functools.partial(diffusers.UNet2DConditionModel, **settings))
    other = cls(**settings)
    other.load_state_dict(stock.state_dict())
    return stock, other.eval()


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    """A network for inference, with the weights that it draws for itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def awakened(net: nn.Module) -> Any:
    """The network with no weight all zero, as ControlNets and motion modules are made, to have no effect at first."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def picture(seed: int, channels: int = 3, size: int = SIZE) -> Tensor:
    """[1, C, H, W] in [0, 1]."""
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    """[1, 1, H, W]: the right half is to be painted anew."""
    return (torch.arange(SIZE) >= SIZE // 2).float().expand(1, 1, SIZE, SIZE)


def vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- parts --------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> Any:
    return train_tokenizer([PROMPT, OTHER_PROMPT], 514, LENGTH)


@functools.cache
def text_encoder(width: int = CONTEXT_WIDTH, projection: int | None = None) -> Any:
    """CLIP's, of two layers; with a projection, the kind whose pooled text is projected."""
    words = tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=projection or width,
        pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return seeded(lambda: cls(config))


@functools.cache
def image_encoder(projection: int) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=8, projection_dim=projection,
    )  # fmt: skip
    return seeded(lambda: transformers.CLIPVisionModelWithProjection(config))


@functools.cache
def vae(levels: int = 2, scale: float = 0.18215) -> Any:
    make = functools.partial(diffusers.AutoencoderKL, norm_num_groups=4, layers_per_block=1, latent_channels=4)
    return seeded(
        lambda: make(
            block_out_channels=[8] * levels,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            scaling_factor=scale,
        )
    )


def ddim() -> Any:
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )


def euler() -> Any:
    return diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, timestep_spacing="leading"
    )


def lcm_scheduler() -> Any:
    return diffusers.LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def controlnet(unet: nn.Module, seed: int = 1) -> Any:
    """A trained one, that began as a copy of the U-Net."""
    make = functools.partial(
        diffusers.ControlNetModel.from_unet, unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 16)
    )
    return awakened(seeded(make, seed))


def adapter(kind: str, channels: Iterable[int], factor: int, seed: int = 0) -> Any:
    make = functools.partial(diffusers.T2IAdapter, channels=list(channels), num_res_blocks=1, downscale_factor=factor)
    return seeded(lambda: make(adapter_type=kind), seed)


def motion_adapter() -> Any:
    make = functools.partial(diffusers.MotionAdapter, motion_norm_num_groups=4, motion_num_attention_heads=2)
    return awakened(seeded(lambda: make(block_out_channels=(16, 32), motion_layers_per_block=1)))


def text_parts() -> dict[str, Any]:
    return {"vae": vae(), "tokenizer": tokenizer(), "text_encoder": text_encoder(), "scheduler": ddim()}


def unchecked() -> dict[str, Any]:
    """The parts of Stable Diffusion's pipelines that look at the finished picture: none."""
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def xl_parts() -> dict[str, Any]:
    second = text_encoder(POOLED_WIDTH, POOLED_WIDTH)
    return {
        **text_parts(),
        "text_encoder": text_encoder(CONTEXT_WIDTH - POOLED_WIDTH),
        "tokenizer_2": tokenizer(),
        "text_encoder_2": second,
        "scheduler": euler(),
    }


# --- cases --------------------------------------------------------------------------------------------------------


def sd(pipeline: str, *changes: dict[str, Any], unet: dict[str, Any] = SD, bare: bool = False,
       parts: Callable[[Any], dict[str, Any]] = lambda unet: {}, **call: Any) -> Case:  # fmt: skip
    """A pipeline of Stable Diffusion's kind; `bare` are those without a safety checker."""
    given = {"prompt": PROMPT, "height": SIZE, "width": SIZE, "output_type": "latent", **call}
    return Case(
        pipeline,
        unet,
        lambda net: {**text_parts(), **({} if bare else unchecked()), **parts(net)},
        {name: value for name, value in given.items() if value is not None},
        ({"prompt": OTHER_PROMPT}, *changes),
    )


def xl(pipeline: str, *changes: dict[str, Any], unet: dict[str, Any] = XL,
       parts: Callable[[Any], dict[str, Any]] = lambda unet: {}, **call: Any) -> Case:  # fmt: skip
    """A pipeline of Stable Diffusion XL's kind."""
    made = sd(pipeline, *changes, unet=unet, bare=True, **call)
    return Case(pipeline, unet, lambda net: {**xl_parts(), **parts(net)}, made.call, made.changes)
