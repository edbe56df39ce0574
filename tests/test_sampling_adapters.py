"""ControlNets and IP-Adapters, with LoRA and without, beside diffusers' own pipelines on the same tiny weights."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_adapters import assert_same, shaken
from tiny_models import save_sd1, save_sdxl
from torch import Tensor

from diffusion_unet.conditioning import Conditioning, size_ids
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from sampling.adapters import AdaptedModel, Control, ImagePrompt, Lora, clip_pixels, from_record, with_adapters
from training.adapters import add_lora, save_lora
from training.config import AdapterConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EMBED = 12  # width of the image encoder's vector
# Without out_proj diffusers does not see the text encoder's part.
TARGETS = (
    "to_q",
    "attn2.to_k",
    "to_out.0",
    "ff.net.2",
    "proj_in",
    "conv1",
    "time_emb_proj",
    "q_proj",
    "fc1",
    "out_proj",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders `sd` and `xl`; for each ControlNets 1 and 2 and IP-Adapters; an image encoder."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, save in (("sd", save_sd1), ("xl", save_sdxl)):
        save(folder / name)
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / name, subfolder="unet")
        for seed in (1, 2):
            tiny.controlnet(unet, seed).save_pretrained(folder / f"{name}-control{seed}")
        keys_values = _keys_values(unet)
        save_file(_with_prefix(_image_proj()) | keys_values, folder / f"{name}-ip.safetensors")
        save_file(_with_prefix(_resampler()) | keys_values, folder / f"{name}-ip-plus.safetensors")
    tiny.image_encoder(EMBED).save_pretrained(folder / "encoder")
    for seed in (1, 2):
        picture(seed).save(folder / f"{seed}.png")
    return folder


def picture(seed: int, size: int = tiny.SIZE) -> Image.Image:
    pixels = (tiny.picture(seed, size=size)[0].permute(1, 2, 0) * 255).byte()
    return Image.fromarray(pixels.numpy())


def _keys_values(unet: Any) -> dict[str, Tensor]:
    """Of an IP-Adapter in the layout of its authors: numbered by the place of the attention."""
    weights = {}
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            to_k = unet.get_submodule(name.removesuffix(".processor")).to_k
            for letter in "kv":
                weights[f"ip_adapter.{number}.to_{letter}_ip.weight"] = tiny.vectors(number, *to_k.weight.shape) / 4
    return weights


def _with_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"image_proj.{name}": value for name, value in weights.items()}


def _image_proj() -> dict[str, Tensor]:
    width = tiny.CONTEXT_WIDTH
    weights = {"proj.weight": tiny.vectors(1, 4 * width, EMBED), "proj.bias": tiny.vectors(2, 4 * width)}
    return weights | {"norm.weight": torch.ones(width), "norm.bias": tiny.vectors(3, width)}


def _resampler() -> dict[str, Tensor]:
    """IP-Adapter Plus, with one head of its 64 wide ones."""
    hidden, inner, width, seen = 8, 64, tiny.CONTEXT_WIDTH, tiny.image_encoder(EMBED).config.hidden_size
    sizes = {"latents": (1, 3, hidden), "proj_in.weight": (hidden, seen), "proj_in.bias": (hidden,)}
    sizes |= {"proj_out.weight": (width, hidden), "proj_out.bias": (width,)}
    sizes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
    for i in range(4):
        sizes |= {f"layers.{i}.0.norm{n}.{part}": (hidden,) for n in (1, 2) for part in ("weight", "bias")}
        sizes |= {f"layers.{i}.1.0.{part}": (hidden,) for part in ("weight", "bias")}
        sizes |= {f"layers.{i}.0.to_q.weight": (inner, hidden), f"layers.{i}.0.to_kv.weight": (2 * inner, hidden)}
        sizes |= {f"layers.{i}.0.to_out.weight": (hidden, inner), f"layers.{i}.1.1.weight": (4 * hidden, hidden)}
        sizes |= {f"layers.{i}.1.3.weight": (hidden, 4 * hidden)}
    return {name: tiny.vectors(number, *size) / 4 for number, (name, size) in enumerate(sizes.items())}


@torch.no_grad()
def drawn(model: DiffusionModel, scheduler: Any, latents: Tensor, steps: int, scale: float) -> Tensor:
    """Guided, with a scheduler of diffusers and our network, both halves in one pass and all constants precomputed."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    assert model.text is not None
    halves = [model.text.encode([text]) for text in (tiny.PROMPT, "")]
    if isinstance(model, AdaptedModel):
        halves = [model.conditioned(half, guiding=guiding) for half, guiding in zip(halves, (True, False), strict=True)]
    both = Conditioning.cat(halves)
    size = (tiny.SIZE, tiny.SIZE)
    ids = None if both.pooled is None else size_ids(size, (0, 0), size).expand(2, -1)
    given: dict[str, Any] = {"pooled": both.pooled, "time_ids": ids}
    precompute: Any = getattr(model.unet, "precompute", None)
    cache = precompute and precompute(both.context, scheduler.timesteps.tolist(), **given)
    rows = 1 if both.pooled is None else 2  # a picture may be given once for both texts
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(latents.repeat(rows, 1, 1, 1), t)
        conditional, unconditional = model.unet(x, float(t), both.context, cache=cache, **given).chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents


STEPS, SCALE = 3, 4.0


def reference(files: Path, base: str, *, controls: int, prompt: str | None, lora: Path | None) -> tuple[Any, Tensor]:
    """A stock pipeline with these adapters, and what it draws."""
    kind = "StableDiffusionXL" if base == "xl" else "StableDiffusion"
    parts: dict[str, Any] = {"add_watermarker": False} if base == "xl" else {}
    call: dict[str, Any] = {}
    if controls:
        nets = [diffusers.ControlNetModel.from_pretrained(files / f"{base}-control{n + 1}") for n in range(controls)]
        parts["controlnet"], kind = nets, kind + "ControlNet"
        call |= {"image": [picture(n + 1) for n in range(controls)]}
        call |= {"controlnet_conditioning_scale": [0.7, -1.2][:controls]}
    pipe = getattr(diffusers, f"{kind}Pipeline").from_pretrained(files / base, **parts)
    pipe.set_progress_bar_config(disable=True)
    if prompt:
        processor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        pipe.register_modules(
            image_encoder=tiny.image_encoder(EMBED), feature_extractor=processor(size=tiny.SIZE, crop_size=tiny.SIZE)
        )
        pipe.load_ip_adapter(str(files), subfolder="", weight_name=f"{base}-{prompt}.safetensors")
        pipe.set_ip_adapter_scale(0.8)
        call |= {"ip_adapter_image": picture(5, 24)}
    if lora:
        pipe.load_lora_weights(lora)
    latents = tiny.vectors(9, 1, 4, tiny.SIZE // 2, tiny.SIZE // 2)
    call |= {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    return pipe, pipe(tiny.PROMPT, latents=latents, output_type="latent", **call).images


CASES: dict[str, dict[str, Any]] = {
    "one-control": {"base": "sd", "controls": 1},
    "two-controls": {"base": "sd", "controls": 2},
    "picture": {"base": "sd", "prompt": "ip"},
    "picture-plus": {"base": "sd", "prompt": "ip-plus"},
    "all": {"base": "sd", "controls": 2, "prompt": "ip", "lora": True},
    "xl-control": {"base": "xl", "controls": 1},
    "xl-picture": {"base": "xl", "controls": 1, "prompt": "ip-plus"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_stock_pipeline_draws_the_same(name: str, files: Path, tmp_path: Path) -> None:
    case: dict[str, Any] = {"controls": 0, "prompt": None, "lora": None, **CASES[name]}
    base = case["base"]
    model = DiffusionModel.load(files / base)
    if case["lora"]:
        lora = DiffusionModel.load(files / base)
        add_lora(lora, AdapterConfig(rank=2, target_modules=TARGETS), text=True, seed=1)
        assert lora.text is not None
        shaken(lora.unet, lora.text)
        save_lora(lora, tmp_path)
        case["lora"] = tmp_path
    pipe, expected = reference(files, **case)
    before = model.fingerprint()
    scales = [0.7, -1.2]
    given = case["prompt"] and ImagePrompt(
        files / f"{base}-{case['prompt']}.safetensors", files / "encoder", picture(5, 24), 0.8
    )
    adapted = with_adapters(
        model,
        loras=[(tmp_path, 1.0)] if case["lora"] else [],
        controlnets=[
            Control(files / f"{base}-control{n + 1}", files / f"{n + 1}.png", scales[n])
            for n in range(case["controls"])
        ],
        ip_adapter=given or None,
        size=(tiny.SIZE, tiny.SIZE),
    )
    latents = tiny.vectors(9, 1, 4, tiny.SIZE // 2, tiny.SIZE // 2)
    ours = drawn(adapted, pipe.scheduler, latents, STEPS, SCALE)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    plain = drawn(model, pipe.scheduler, latents, STEPS, SCALE)
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()
    assert model.fingerprint() == before
    kinds = [entry["kind"] for entry in adapted.record]  # type: ignore[attr-defined]
    assert kinds == ["lora"] * bool(case["lora"]) + ["controlnet"] * case["controls"] + ["ip_adapter"] * bool(given)


def test_a_mask_of_the_text_goes_on_over_the_picture(files: Path) -> None:
    prompt = ImagePrompt(files / "sd-ip.safetensors", files / "encoder", picture(5))
    adapted = with_adapters(DiffusionModel.load(files / "sd"), ip_adapter=prompt)
    assert isinstance(adapted, AdaptedModel) and adapted.text is not None
    text = adapted.text.encode([tiny.PROMPT])
    seen = Conditioning(context=text.context, mask=torch.arange(tiny.LENGTH)[None] < 5)
    masked = adapted.conditioned(seen, guiding=True)
    assert masked.mask is not None and masked.mask.sum() == 5 + 4
    assert masked.context is not None and text.context is not None
    x = tiny.vectors(1, 1, 4, 8, 8)
    short = adapted.conditioned(Conditioning(context=text.context[:, :5]), guiding=True)
    with torch.no_grad():
        one = adapted.unet(x, 10.0, masked.context, context_mask=masked.mask)
        assert_same(one, adapted.unet(x, 10.0, short.context))


def test_a_picture_is_read_as_by_clips_own_processor() -> None:
    processor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    for size in ((50, 31), (20, 77), (16, 16)):
        noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0)).byte()
        image = Image.fromarray(noise.numpy())
        expected = processor(size=16, crop_size=16)(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(clip_pixels(image, 16), expected, rtol=1e-5, atol=1e-6)


def test_files_and_scales_are_read_from_the_command_line() -> None:
    assert Lora.parse("a.safetensors") == ("a.safetensors", 1.0)
    assert Lora.parse("C:/a:b.safetensors:-0.5") == ("C:/a:b.safetensors", -0.5)
    assert Control.parse("canny:0.7", "edges.png") == ("canny", "edges.png", 0.7)
    assert ImagePrompt.parse("ip.safetensors", "encoder", "cat.png").scale == 1.0


def test_a_record_gives_the_adapters_back(files: Path) -> None:
    given: dict[str, Any] = {
        "controlnets": [Control(files / "sd-control1", files / "1.png", 0.5)],
        "ip_adapter": ImagePrompt(files / "sd-ip.safetensors", files / "encoder", files / "2.png", 0.25),
    }
    adapted = with_adapters(DiffusionModel.load(files / "sd"), **given, size=(16, 16))
    assert isinstance(adapted, AdaptedModel)
    entries = json.loads(json.dumps(adapted.record))
    digest = hashlib.sha256((files / "sd-ip.safetensors").read_bytes()).hexdigest()
    assert entries[1]["sha256"] == digest
    here = [
        entry | {name: Path(entry[name]["path"]) for name in ("image", "encoder") if name in entry} for entry in entries
    ]
    again = from_record([entry | {"path": Path(entry["path"])} for entry in here])
    assert again == {"loras": [], **given}
    with pytest.raises(InputError, match="lacks its encoder"):
        from_record([entry for entry in here if entry.pop("encoder", None)])
    with pytest.raises(InputError, match="of the kind 'x'"):
        from_record([{"kind": "x", "path": "", "scale": 1.0}])


# --- bad input ----------------------------------------------------------------------------------------------------


def _edited(files: Path, path: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A ControlNet's folder with another config."""
    shutil.copytree(files / name, path / name)
    config = json.loads((path / name / "config.json").read_text())
    (path / name / "config.json").write_text(json.dumps(config | changes))
    return {"controlnets": [Control(path / name, files / "1.png")], "size": (16, 16)}


def _ip(files: Path, path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Any]:
    save_file(change(load_file(files / "sd-ip.safetensors")), path / "bad.safetensors")
    return {"ip_adapter": ImagePrompt(path / "bad.safetensors", files / "encoder", files / "1.png")}


BAD: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "other control": (
        lambda f, p: {"controlnets": [(f / "xl-control1", f / "1.png")], "size": (16, 16)},
        "addition_embed_type is 'text_time', and None fits this model: it is for another one",
    ),
    "no control": (lambda f, p: {"controlnets": [(f / "sd", f / "1.png")]}, "config.json: cannot be read"),
    "class": (lambda f, p: _edited(f, p, "sd-control1", _class_name="os.system"), "'os.system': a ControlNetModel is"),
    "huge": (lambda f, p: _edited(f, p, "sd-control1", transformer_layers_per_block=10**6), "transformer_layers"),
    "pooled": (lambda f, p: _edited(f, p, "sd-control1", global_pool_conditions=True), "global_pool_conditions"),
    "stranger's key": (
        lambda f, p: _ip(f, p, lambda t: t | {"x": torch.zeros(1)}),
        "'x' is no tensor of an IP-Adapter",
    ),
    "other ip": (
        lambda f, p: _ip(f, p, lambda t: {k: v[:, 1:].contiguous() if "to_k_ip" in k else v for k, v in t.items()}),
        "no IP-Adapter for this model",
    ),
    "more ip": (
        lambda f, p: _ip(f, p, lambda t: t | {"ip_adapter.99.to_k_ip.weight": torch.zeros(1)}),
        "an IP-Adapter for another model",
    ),
    "encoder": (
        lambda f, p: {"ip_adapter": ImagePrompt(f / "sd-ip.safetensors", f / "sd" / "text_encoder", f / "1.png")},
        "a CLIPVisionModelWithProjection is needed",
    ),
    "picture": (
        lambda f, p: {"ip_adapter": ImagePrompt(f / "sd-ip.safetensors", f / "encoder", p / "none.png")},
        "none.png",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(case: str, files: Path, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    model = DiffusionModel.load(files / "sd")
    with pytest.raises(InputError, match=message) as caught:
        with_adapters(model, **arguments(files, tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_an_image_encoder_of_another_width_is_one_line(files: Path, tmp_path: Path) -> None:
    tiny.image_encoder(EMBED + 4).save_pretrained(tmp_path)
    prompt = ImagePrompt(files / "sd-ip.safetensors", tmp_path, files / "1.png")
    with pytest.raises(InputError, match="take the image encoder that belongs to this IP-Adapter"):
        with_adapters(DiffusionModel.load(files / "sd"), ip_adapter=prompt)


def test_a_control_picture_holds_for_the_size_that_it_was_given_for(files: Path) -> None:
    control = Control(files / "sd-control1", files / "1.png")
    adapted = with_adapters(DiffusionModel.load(files / "sd"), controlnets=[control], size=(16, 32))
    assert adapted.text is not None
    context = adapted.text.encode([tiny.PROMPT]).context
    assert adapted.unet(torch.zeros(1, 4, 8, 16), 10.0, context).shape == (1, 4, 8, 16)
    with pytest.raises(InputError, match="a size of 32x16: draw that one"):
        adapted.unet(torch.zeros(1, 4, 8, 8), 10.0, context)
    with pytest.raises(InputError, match="give all adapters at once"):
        with_adapters(adapted, controlnets=[control], size=(16, 32))
