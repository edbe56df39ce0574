"""Every kind of pipeline that takes a U-Net draws with the drop-in what it draws with diffusers' class."""

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
import transformers
from diffusers import UNet2DConditionModel as Stock
from tiny_pipelines import OTHER_PROMPT, SD, SD2, SIZE, XL, Case, mask, picture, sd, seeded, vectors, xl
from torch import Tensor, nn

from diffusion_unet import InputError
from diffusion_unet import UNet2DConditionModel as Ours

# Diffusers' EulerDiscreteScheduler hands a tensor to numpy in a way of numpy 1, and Kolors' module compiles functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]

close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)

NEW_IMAGE = {"image": picture(9)}
NEW_MASK = {"mask_image": 1 - mask()}
NEW_CONTROL = {"control_image": picture(9)}
NEW_NOISE = {"latents": vectors(9, 1, 4, SIZE // 2, SIZE // 2)}


def with_controlnet(net: nn.Module) -> dict[str, Any]:
    return {"controlnet": tiny.controlnet(net)}


def with_controlnets(net: nn.Module) -> dict[str, Any]:
    return {"controlnet": [tiny.controlnet(net, seed) for seed in (1, 2)]}


def with_adapter(net: nn.Module) -> dict[str, Any]:
    return {"adapter": tiny.adapter("full_adapter", (16, 32), 2)}


def with_xl_adapter(net: nn.Module) -> dict[str, Any]:
    return {"adapter": tiny.adapter("full_adapter_xl", (16, 32, 32, 32), 4)}


def with_two_adapters(net: nn.Module) -> dict[str, Any]:
    return {"adapter": [tiny.adapter("full_adapter", (16, 32), 2, seed) for seed in (1, 2)]}


def upscale() -> Case:
    config = {**SD, "in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": [True, False]}
    return sd(
        "StableDiffusionUpscalePipeline",
        {"noise_level": 300},
        {"image": picture(9, size=8)},
        unet=config,
        bare=True,
        parts=lambda net: {"vae": tiny.vae(3, 0.08333), "low_res_scheduler": diffusers.DDPMScheduler()},
        image=picture(1, size=8),
        height=None,
        width=None,
    )


def latent_upscale() -> Case:
    """The one whose U-Net is outside the core, and runs diffusers' own body."""
    config = {
        **SD,
        "in_channels": 8,
        "out_channels": 5,
        "block_out_channels": [32, 64, 64],
        "layers_per_block": 2,
        "down_block_types": ["KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"],
        "mid_block_type": None,
        "up_block_types": ["KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"],
        "attention_head_dim": 8,
        "time_embedding_dim": 64,
        "time_embedding_type": "fourier",
        "resnet_time_scale_shift": "scale_shift",
        "time_cond_proj_dim": 128 + tiny.CONTEXT_WIDTH,
        "timestep_post_act": "gelu",
        "act_fn": "gelu",
    }
    return sd(
        "StableDiffusionLatentUpscalePipeline",
        {"image": vectors(9, 1, 4, 8, 8)},
        unet=config,
        bare=True,
        parts=lambda net: {"scheduler": tiny.euler()},
        image=vectors(1, 1, 4, 8, 8),
        height=None,
        width=None,
    )


def depth() -> Case:
    return sd(
        "StableDiffusionDepth2ImgPipeline",
        {"depth_map": picture(9, 1)[0]},
        NEW_IMAGE,
        unet={**SD2, "in_channels": 5},
        bare=True,
        parts=lambda net: {"depth_estimator": None, "feature_extractor": None},
        image=picture(1),
        depth_map=picture(2, 1)[0],
        height=None,
        width=None,
    )


def image_variation() -> Case:
    case = sd("StableDiffusionImageVariationPipeline")
    parts = {"vae": tiny.vae(), "image_encoder": tiny.image_encoder(tiny.CONTEXT_WIDTH), "safety_checker": None,
             "feature_extractor": transformers.CLIPImageProcessor(), "requires_safety_checker": False}  # fmt: skip
    call = {**case.call, "image": picture(1)}
    del call["prompt"]
    return Case(case.pipeline, SD, lambda net: {**parts, "scheduler": tiny.ddim()}, call, (NEW_IMAGE,))


def noising(width: int) -> dict[str, Any]:
    """What unCLIP does to the embedding of a picture before its U-Net is given it."""
    return {
        "image_normalizer": seeded(lambda: diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(width)),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


UNCLIP = {**SD2, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 24}


def unclip() -> Case:
    def parts(net: nn.Module) -> dict[str, Any]:
        prior = {"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 1, "embedding_dim": 12,
                 "num_embeddings": tiny.LENGTH}  # fmt: skip
        return noising(12) | {
            "prior_tokenizer": tiny.tokenizer(),
            "prior_text_encoder": tiny.text_encoder(12, 12),
            "prior": seeded(lambda: diffusers.PriorTransformer(**prior)),
            "prior_scheduler": diffusers.UnCLIPScheduler(num_train_timesteps=1000, prediction_type="sample"),
        }

    return sd(
        "StableUnCLIPPipeline", {"noise_level": 900}, unet=UNCLIP, bare=True, parts=parts, prior_num_inference_steps=2
    )


def unclip_image() -> Case:
    def parts(net: nn.Module) -> dict[str, Any]:
        encoder = {"image_encoder": tiny.image_encoder(12), "feature_extractor": transformers.CLIPImageProcessor()}
        return noising(12) | encoder

    return sd("StableUnCLIPImg2ImgPipeline", NEW_IMAGE, unet=UNCLIP, bare=True, parts=parts, image=picture(1))


def refiner() -> Case:
    size = XL["projection_class_embeddings_input_dim"] - XL["addition_time_embed_dim"]  # five sizes, not six
    return xl(
        "StableDiffusionXLImg2ImgPipeline",
        {"aesthetic_score": 2.0},
        NEW_IMAGE,
        unet={**XL, "cross_attention_dim": tiny.POOLED_WIDTH, "projection_class_embeddings_input_dim": size},
        parts=lambda net: {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True},
        image=picture(1),
        strength=0.9,
        height=None,
        width=None,
    )


def marigold() -> Case:
    return Case(
        "MarigoldDepthPipeline",
        {**SD2, "in_channels": 8},
        lambda net: {**tiny.text_parts(), "default_processing_resolution": SIZE, "default_denoising_steps": 2},
        {"image": picture(1), "output_type": "pt"},
        (NEW_IMAGE,),
    )


@functools.cache
def kolors_pipeline() -> Any:
    """Its class; the module asks for the library of a tokenizer that is not needed where the text comes encoded."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("sentencepiece") is None:
            patch.setitem(sys.modules, "sentencepiece", SimpleNamespace(SentencePieceProcessor=None))
        return importlib.import_module("diffusers.pipelines.kolors.pipeline_kolors").KolorsPipeline


def kolors() -> Case:
    """Its text encoder is a language model of 6 billion parameters; its output is passed instead."""
    unet = {**XL, "encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"}
    pooled = tiny.POOLED_WIDTH

    def text(seed: int) -> dict[str, Tensor]:
        return {"prompt_embeds": vectors(seed, 1, 6, 20), "pooled_prompt_embeds": vectors(seed, 1, pooled)}

    negative = {f"negative_{name}": value for name, value in text(2).items()}
    call = {**xl("", prompt=None).call, **text(1), **negative}
    parts = {"vae": tiny.vae(), "text_encoder": None, "tokenizer": None}
    return Case(kolors_pipeline(), unet, lambda net: {**parts, "scheduler": tiny.euler()}, call, (text(3),))


def animate(make: Callable[..., Case], pipeline: str) -> Case:
    def parts(net: nn.Module) -> dict[str, Any]:
        return {"motion_adapter": tiny.motion_adapter()}

    options = {"bare": True} if make is sd else {}
    return make(pipeline, parts=parts, num_frames=2, **options)


INPAINT = {"image": picture(1), "mask_image": mask()}
FROM_IMAGE = {"image": picture(1), "height": None, "width": None, "strength": 0.9}
CONTROL = {"image": picture(3)}
TWO_CONTROLS = {"image": [picture(3), picture(4)], "controlnet_conditioning_scale": [0.7, 1.2]}
LCM = {"unet": {**SD, "time_cond_proj_dim": 10}, "parts": lambda net: {"scheduler": tiny.lcm_scheduler()}}
PAG = {"pag_scale": 2.0}


def with_pag(net: nn.Module) -> dict[str, Any]:
    return {"pag_applied_layers": ["mid"]}


CASES: dict[str, Callable[[], Case]] = {
    "text-to-image": lambda: sd(
        "StableDiffusionPipeline", {"negative_prompt": "small"}, {"guidance_rescale": 0.7}, NEW_NOISE
    ),
    "text-to-image, pixels": lambda: sd("StableDiffusionPipeline", output_type="np", eta=1.0, num_images_per_prompt=2),
    "image-to-image": lambda: sd("StableDiffusionImg2ImgPipeline", NEW_IMAGE, **FROM_IMAGE),
    "inpaint, 4 channels": lambda: sd("StableDiffusionInpaintPipeline", NEW_IMAGE, **INPAINT),
    "inpaint, 9 channels": lambda: sd(
        "StableDiffusionInpaintPipeline", NEW_IMAGE, NEW_MASK, unet={**SD, "in_channels": 9}, **INPAINT
    ),
    "InstructPix2Pix": lambda: sd(
        "StableDiffusionInstructPix2PixPipeline", NEW_IMAGE, {"image_guidance_scale": 3.0},
        unet={**SD, "in_channels": 8}, image=picture(1), height=None, width=None,
    ),
    "upscale": upscale,
    "upscale latents": latent_upscale,
    "depth": depth,
    "image variation": image_variation,
    "unCLIP": unclip,
    "unCLIP of an image": unclip_image,
    "XL": lambda: xl("StableDiffusionXLPipeline", {"original_size": (64, 32)}, NEW_NOISE),
    "XL image-to-image": lambda: xl("StableDiffusionXLImg2ImgPipeline", NEW_IMAGE, **FROM_IMAGE),
    "XL refiner": refiner,
    "XL inpaint": lambda: xl("StableDiffusionXLInpaintPipeline", NEW_IMAGE, **INPAINT),
    "XL inpaint, 9 channels": lambda: xl(
        "StableDiffusionXLInpaintPipeline", NEW_MASK, unet={**XL, "in_channels": 9}, **INPAINT
    ),
    "XL InstructPix2Pix": lambda: xl(
        "StableDiffusionXLInstructPix2PixPipeline", NEW_IMAGE, unet={**XL, "in_channels": 8}, image=picture(1),
    ),
    "ControlNet": lambda: sd("StableDiffusionControlNetPipeline", NEW_IMAGE, parts=with_controlnet, **CONTROL),
    "ControlNet, two": lambda: sd(
        "StableDiffusionControlNetPipeline", {"image": [picture(3), picture(9)]}, parts=with_controlnets, **TWO_CONTROLS
    ),
    "ControlNet, guessing": lambda: sd(
        "StableDiffusionControlNetPipeline", NEW_IMAGE, parts=with_controlnet, guess_mode=True, **CONTROL
    ),
    "ControlNet image-to-image": lambda: sd(
        "StableDiffusionControlNetImg2ImgPipeline", NEW_IMAGE, NEW_CONTROL, parts=with_controlnet, image=picture(1),
        control_image=picture(3),
    ),
    "ControlNet inpaint": lambda: sd(
        "StableDiffusionControlNetInpaintPipeline", NEW_CONTROL, parts=with_controlnet, control_image=picture(3),
        **INPAINT,
    ),
    "XL ControlNet": lambda: xl("StableDiffusionXLControlNetPipeline", NEW_IMAGE, parts=with_controlnet, **CONTROL),
    "XL ControlNet, two": lambda: xl(
        "StableDiffusionXLControlNetPipeline", {"image": [picture(3), picture(9)]}, parts=with_controlnets,
        **TWO_CONTROLS,
    ),
    "T2I-Adapter": lambda: sd("StableDiffusionAdapterPipeline", NEW_IMAGE, parts=with_adapter, image=picture(3)),
    "T2I-Adapter, two": lambda: sd(
        "StableDiffusionAdapterPipeline", {"image": [picture(3), picture(9)]}, parts=with_two_adapters,
        image=[picture(3), picture(4)], adapter_conditioning_scale=[0.7, 1.2],
    ),
    "XL T2I-Adapter": lambda: xl(
        "StableDiffusionXLAdapterPipeline", NEW_IMAGE, {"adapter_conditioning_factor": 0.0}, unet=tiny.XL_THREE_LEVELS,
        parts=with_xl_adapter, image=picture(3),
    ),
    "LCM": lambda: sd("LatentConsistencyModelPipeline", {"guidance_scale": 3.0}, **LCM),
    "LCM image-to-image": lambda: sd(
        "LatentConsistencyModelImg2ImgPipeline", NEW_IMAGE, {"guidance_scale": 3.0}, **LCM, **FROM_IMAGE,
    ),
    "PAG": lambda: sd("StableDiffusionPAGPipeline", {"pag_scale": 0.0}, parts=with_pag, **PAG),
    "PAG image-to-image": lambda: sd(
        "StableDiffusionPAGImg2ImgPipeline", NEW_IMAGE, parts=with_pag, **PAG, **FROM_IMAGE
    ),
    "PAG ControlNet": lambda: sd(
        "StableDiffusionControlNetPAGPipeline", NEW_IMAGE, {"pag_scale": 0.0},
        parts=lambda net: {**with_pag(net), **with_controlnet(net)}, **PAG, **CONTROL,
    ),
    "XL PAG": lambda: xl("StableDiffusionXLPAGPipeline", {"pag_scale": 0.0}, parts=with_pag, **PAG),
    "Marigold": marigold,
    "Kolors": kolors,
    "AnimateDiff": lambda: animate(sd, "AnimateDiffPipeline"),
    "XL AnimateDiff": lambda: animate(xl, "AnimateDiffSDXLPipeline"),
}  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_draws_what_stock_draws(name: str) -> None:
    """The same picture, and the same other one for every change to the prompt, the image or the settings."""
    case = CASES[name]()
    unets = tiny.pair(case.unet, Ours)
    stock, ours = (case.assemble(unet) for unet in unets)
    assert type(unets[0]) is Stock and unets[1].native is (name != "upscale latents")

    drawn = case.draw(ours)
    assert drawn.isfinite().all() and drawn.std() > 0
    close(drawn, case.draw(stock))
    for change in case.changes:
        changed = case.draw(ours, **change)
        assert relative(changed, drawn) > 1e-3, f"{change} changes nothing"
        close(changed, case.draw(stock, **change))


# --- ways to come by a pipeline ------------------------------------------------------------------------------------

TEXT, IMAGE, INPAINTING = (
    diffusers.AutoPipelineForText2Image,
    diffusers.AutoPipelineForImage2Image,
    diffusers.AutoPipelineForInpainting,
)


@pytest.mark.parametrize(
    ("start", "auto", "end", "options"),
    [
        ("text-to-image", IMAGE, "image-to-image", {}),
        ("image-to-image", INPAINTING, "inpaint, 4 channels", {}),
        ("inpaint, 4 channels", TEXT, "text-to-image", {}),
        ("text-to-image", TEXT, "PAG", {"enable_pag": True}),
        ("text-to-image", TEXT, "ControlNet", {"controlnet": True}),
        ("text-to-image", diffusers.StableDiffusionImg2ImgPipeline, "image-to-image", {}),
        ("XL", IMAGE, "XL image-to-image", {}),
        ("XL image-to-image", INPAINTING, "XL inpaint", {}),
    ],
)
def test_one_pipeline_becomes_another(start: str, auto: Any, end: str, options: dict[str, Any]) -> None:
    """`from_pipe` takes the U-Net along, and the pipeline that it makes draws as the one with stock's."""
    target = CASES[end]()
    stock, ours = tiny.pair(target.unet, Ours)
    options = options | (with_controlnet(ours) if "controlnet" in options else {})
    pipe = auto.from_pipe(CASES[start]().assemble(ours), **options)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == target.pipeline and pipe.unet is ours
    close(target.draw(pipe), target.draw(target.assemble(stock)))


@pytest.mark.parametrize("name", ["text-to-image", "XL"])
def test_folders_serve_both_classes(name: str, tmp_path: Path) -> None:
    """A stock folder is drawn from with `unet=...`, and what is saved with ours is stock's to the last name."""
    case = CASES[name]()
    stock, ours = (case.assemble(unet) for unet in tiny.pair(case.unet, Ours))
    expected = case.draw(stock)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")

    for loader in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image):
        pipe = loader.from_pretrained(tmp_path / "stock", unet=ours.unet)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.unet is ours.unet
        close(case.draw(pipe), expected)

    files, indices = zip(*(listing(tmp_path / folder) for folder in ("stock", "ours")), strict=True)
    assert files[0] == files[1] and indices[0] == indices[1]
    assert indices[1]["unet"] == ["diffusers", "UNet2DConditionModel"]
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded.unet) is Stock
    close(case.draw(reloaded), expected)


def listing(folder: Path) -> tuple[set[Path], dict[str, Any]]:
    """The files of a pipeline's folder, and what its index says of them."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return files, json.loads((folder / "model_index.json").read_text())


# --- cached() around a pipeline ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["text-to-image", "XL", "upscale", "ControlNet", "T2I-Adapter", "LCM", "Kolors", "PAG"]
)
def test_cached_draws_the_same(name: str) -> None:
    """In one block: a picture, one for every change to the prompt or the settings, and the first one once more."""
    case = CASES[name]()
    pipe = case.assemble(tiny.pair(case.unet, Ours)[1])
    requests = [{}, *case.changes, {}]
    plain = [case.draw(pipe, **changes) for changes in requests]
    with pipe.unet.cached():
        kept = [case.draw(pipe, **changes) for changes in requests]
    for drawn, expected in zip(kept, plain, strict=True):
        assert relative(drawn, expected) < 1e-5
    assert relative(plain[1], plain[0]) > 1e-3


def test_cached_computes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a prompt, and projections of a timestep, however many steps and pictures they serve."""
    case = CASES["text-to-image"]()
    pipe = case.assemble(tiny.pair(case.unet, Ours)[1])
    keys = counter(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k, monkeypatch)
    times = counter(pipe.unet.mid_block.resnets[0].time_emb_proj, monkeypatch)
    for context, expected in ((contextlib.nullcontext(), (6, 6)), (pipe.unet.cached(), (2, 3))):
        keys.clear()
        times.clear()
        with context:
            for prompt in (tiny.PROMPT, OTHER_PROMPT):
                case.draw(pipe, prompt=prompt, num_inference_steps=3)
        assert (len(keys), len(times)) == expected


def counter(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by one whenever the layer runs."""
    calls: list[Any] = []
    run = layer.forward

    def forward(x: Tensor) -> Tensor:
        calls.append(None)
        return run(x)

    monkeypatch.setattr(layer, "forward", forward)
    return calls


def test_cached_refuses_an_ip_adapter() -> None:
    case = CASES["text-to-image"]()
    pipe = case.assemble(tiny.pair(case.unet, Ours)[1])
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    image = {"ip_adapter_image_embeds": [vectors(1, 2, 1, 12)]}
    assert relative(case.draw(pipe, **image), case.draw(pipe, ip_adapter_image_embeds=[vectors(2, 2, 1, 12)])) > 1e-3
    with pytest.raises(InputError, match="attention processor"), pipe.unet.cached():
        case.draw(pipe, **image)


def ip_adapter(unet: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The weights of one that turns an image vector of width 12 into four tokens."""
    width = tiny.CONTEXT_WIDTH
    image = {"proj.weight": vectors(1, 4 * width, 12), "proj.bias": vectors(2, 4 * width),
             "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}  # fmt: skip
    readers = [module.attn2 for module in unet.modules() if hasattr(module, "attn2")]
    projections = {
        f"{2 * i + 1}.to_{part}_ip.weight": vectors(i, reader.inner_dim, width)
        for i, reader in enumerate(readers)
        for part in "kv"
    }
    return {"image_proj": image, "ip_adapter": projections}
