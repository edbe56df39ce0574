"""The original layout in one file: stock diffusers reads back the very weights of the folder, by the released names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from families import FAMILIES, NARROW
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import LENGTH, SD2, XL, ddim, euler, seeded, tokenizer, unchecked
from tiny_pipelines import SD as SD1
from torch import Tensor, nn

from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.single_file import modelspec, placed, unet_places, write_single_file

CONTEXT = 24
XL_WIDTHS = (8, 16)


def noisy(net: nn.Module) -> Any:
    """The network with all weights random: a constant would hide an exchange of two of them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def unet(config: dict[str, Any]) -> Any:
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return noisy(seeded(lambda: UNet2DConditionModel(**settings)))


def vae(levels: int = 4, layers: int = 2, **changes: Any) -> Any:
    settings = {
        "block_out_channels": [4, 8, 16, 16][:levels],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return noisy(seeded(lambda: AutoencoderKL(**settings | changes)))


def text(width: int, layers: int, act: str, projection: int | None = None) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer()), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=projection or width, hidden_act=act,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return noisy(seeded(lambda: cls(config)))


def sd1(config: dict[str, Any] = SD1, pipeline: str = "StableDiffusionPipeline", layers: int = 2, **parts: Any) -> Any:
    given = {"vae": vae(2, 1), "text_encoder": text(CONTEXT, layers, "quick_gelu")} | parts
    cls = getattr(diffusers, pipeline)
    return cls(unet=unet(config), tokenizer=tokenizer(), scheduler=ddim(), **given, **unchecked())


def sd2(config: dict[str, Any] = SD2, layers: int = 2, **parts: Any) -> Any:
    return sd1(config, text_encoder=text(CONTEXT, layers, "gelu"), **parts)


def xl(
    config: dict[str, Any] = XL,
    pipeline: str = "StableDiffusionXLPipeline",
    layers: tuple[int, int] = (2, 2),
    **parts: Any,
) -> Any:
    first, second = XL_WIDTHS
    encoders = {
        "text_encoder": text(first, layers[0], "quick_gelu"),
        "text_encoder_2": text(second, layers[1], "gelu", 16),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
    }
    given = {"vae": vae(2, 1), "scheduler": euler(), **encoders} | parts
    return getattr(diffusers, pipeline)(unet=unet(config), **given)


def refiner() -> Any:
    alone = {"text_encoder": None, "tokenizer": None, "text_encoder_2": text(CONTEXT, 2, "gelu", 16)}
    return xl(XL, "StableDiffusionXLImg2ImgPipeline", **alone)


def weights(pipe: Any) -> dict[str, dict[str, Tensor]]:
    return {name: part.state_dict() for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def assert_same(found: Any, expected: Any) -> None:
    theirs = weights(expected)
    ours = weights(found)
    assert ours.keys() == theirs.keys() and "unet" in ours
    for part, tensors in theirs.items():
        assert ours[part].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert ours[part][key].dtype == tensor.dtype and torch.equal(ours[part][key], tensor), f"{part} {key}"


def stock_reads(path: Path, folder: Path, cls: type, dtype: torch.dtype | None = None) -> Any:
    """The pipeline that stock diffusers makes of the file and of the folder's settings; its weights are taken away."""
    for weight in folder.glob("*/*.safetensors*"):
        weight.unlink()
    reader: Any = cls
    return reader.from_single_file(str(path), config=str(folder), local_files_only=True, torch_dtype=dtype)


def keys(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


# --- equal weights --------------------------------------------------------------------------------------------------

PIPES: dict[str, Callable[[], Any]] = {
    "refiner": refiner,
    "inpaint": lambda: sd1({**SD1, "in_channels": 9}, "StableDiffusionInpaintPipeline"),
    "instruct": lambda: sd1({**SD1, "in_channels": 8}, "StableDiffusionInstructPix2PixPipeline"),
    "xl-inpaint": lambda: xl({**XL, "in_channels": 9}, "StableDiffusionXLInpaintPipeline"),
    "xl-instruct": lambda: xl({**XL, "in_channels": 8}, "StableDiffusionXLInstructPix2PixPipeline"),
}


@pytest.mark.parametrize("name", PIPES)
def test_stock_from_single_file_gives_equal_weights(name: str, tmp_path: Path) -> None:
    pipe = PIPES[name]()
    pipe.save_pretrained(tmp_path / "folder")
    path = write_single_file(tmp_path / "folder", tmp_path / "out" / "model.safetensors")
    assert path == tmp_path / "out" / "model.safetensors"
    assert_same(stock_reads(path, tmp_path / "folder", type(pipe)), pipe)


# Of the released files: each part's number of tensors at as many layers, less OpenCLIP's that no folder holds
# (logit_scale, and in SD 2.x the projection and the layer that is never run), and some of their names. Theirs are 12
# layers of CLIP, 23 and 32 of OpenCLIP; SDXL's transformers are deeper, which the test at full width counts.
RELEASED: dict[str, tuple[Callable[[], Any], dict[str, int], list[str]]] = {
    "sd1": (
        lambda: sd1(NARROW["sd15"], layers=12, vae=vae()),
        {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.transformer.text_model.": 197},
        [
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
            "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight",
            "first_stage_model.decoder.mid.attn_1.proj_out.weight",
            "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
            "first_stage_model.decoder.up.3.upsample.conv.weight",
            "first_stage_model.encoder.down.2.downsample.conv.bias",
            "first_stage_model.encoder.norm_out.weight",
            "model.diffusion_model.input_blocks.3.0.op.weight",
            "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
            "model.diffusion_model.output_blocks.2.1.conv.weight",
            "model.diffusion_model.output_blocks.5.2.conv.weight",
            "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        ],
    ),
    "sd2": (
        lambda: sd2(NARROW["sd21"], layers=3, vae=vae()),
        {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.model.": 4 + 12 * 3},
        [
            "cond_stage_model.model.ln_final.bias",
            "cond_stage_model.model.positional_embedding",
            "cond_stage_model.model.token_embedding.weight",
            "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight",
            "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.bias",
        ],
    ),
    "xl": (
        lambda: xl(NARROW["sdxl"], layers=(12, 10), vae=vae()),
        {
            "model.diffusion_model.": 1680 - 6 * (10 - 3) * 20,
            "first_stage_model.": 248,
            "conditioner.embedders.0.transformer.text_model.": 197,
            "conditioner.embedders.1.model.": 5 + 12 * 10,
        },
        [
            "conditioner.embedders.1.model.text_projection",
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
            "conditioner.embedders.1.model.transformer.resblocks.9.ln_2.weight",
            "model.diffusion_model.label_emb.0.2.bias",
            "model.diffusion_model.output_blocks.2.2.conv.weight",
            "model.diffusion_model.output_blocks.8.0.skip_connection.weight",
        ],
    ),
}


@pytest.mark.parametrize("family", RELEASED)
def test_the_keys_are_those_of_the_released_files(family: str, tmp_path: Path) -> None:
    make, counts, names = RELEASED[family]
    pipe = make()
    pipe.save_pretrained(tmp_path / "folder")
    path = write_single_file(tmp_path / "folder", tmp_path / "model.safetensors")
    written = keys(path)
    assert {prefix: sum(key.startswith(prefix) for key in written) for prefix in counts} == counts
    assert len(written) == sum(counts.values())
    assert written.issuperset(names)
    attention = load_file(path)["first_stage_model.encoder.mid.attn_1.q.weight"]
    assert attention.shape == (16, 16, 1, 1)
    assert_same(stock_reads(path, tmp_path / "folder", type(pipe)), pipe)


@pytest.mark.parametrize(("family", "count"), [("sd15", 686), ("sdxl", 1680), ("ssd-1b", None)])
def test_at_full_width_stock_finds_every_weight_of_the_unet(family: str, count: int | None, tmp_path: Path) -> None:
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(FAMILIES[family])
    stock.save_config(tmp_path)
    places = unet_places(UNetConfig.from_diffusers(FAMILIES[family]))
    tensors = placed(stock.state_dict(), places, "model.diffusion_model.")
    assert len(tensors) == count or count is None
    read = UNet2DConditionModel.from_single_file(tensors, config=str(tmp_path), device="meta")
    assert {k: v.shape for k, v in read.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}


@pytest.mark.parametrize("changes", [{"layers": 1, "levels": 3}, {"layers": 3, "levels": 2}], ids=str)
def test_the_autoencoder_may_have_any_number_of_levels_and_layers(changes: dict[str, int], tmp_path: Path) -> None:
    pipe = sd1(vae=vae(**changes))
    pipe.save_pretrained(tmp_path / "folder")
    path = write_single_file(tmp_path / "folder", tmp_path / "model.safetensors")
    read = AutoencoderKL.from_single_file(str(path), config=str(tmp_path / "folder"), subfolder="vae")
    assert not [key for key, value in read.state_dict().items() if not torch.equal(value, pipe.vae.state_dict()[key])]


# --- how the folder is written, and the file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{"variant": "ema"}, {"max_shard_size": "60KB"}, {"variant": "ema", "max_shard_size": "60KB"}], ids=str
)
def test_variants_and_shards_are_read(how: dict[str, str], tmp_path: Path) -> None:
    pipe = sd2()
    pipe.save_pretrained(tmp_path / "folder", **how)
    assert len(list((tmp_path / "folder" / "unet").glob("*.safetensors"))) == 1 or "max_shard_size" in how
    path = write_single_file(tmp_path / "folder", tmp_path / "model.safetensors", variant=how.get("variant"))
    assert_same(stock_reads(path, tmp_path / "folder", type(pipe)), pipe)


def test_precision(tmp_path: Path) -> None:
    pipe = sd1()
    pipe.save_pretrained(tmp_path / "folder")
    full = load_file(write_single_file(tmp_path / "folder", tmp_path / "full.safetensors"))
    path = write_single_file(tmp_path / "folder", tmp_path / "half.safetensors", dtype=torch.float16)
    half = load_file(path)
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert {key for key, value in half.items() if value.dtype != torch.float16} == {ids}
    assert torch.equal(half[ids], torch.arange(LENGTH)[None])
    assert all(torch.equal(half[key], value.half()) for key, value in full.items() if key != ids)
    assert_same(stock_reads(path, tmp_path / "folder", type(pipe), torch.float16), pipe.to(torch.float16))


def test_files_of_2022_are_read(tmp_path: Path) -> None:
    pipe = sd1()
    pipe.save_pretrained(tmp_path / "folder")
    expected = load_file(write_single_file(tmp_path / "folder", tmp_path / "modern.safetensors"))
    spelling = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    weights = tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for key, value in load_file(weights).items():
        for name, of_2022 in spelling.items():
            key = key.replace(name, of_2022)
        old[key] = value.clone()
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    save_file(old, weights)
    words = tmp_path / "folder" / "text_encoder" / "model.safetensors"
    save_file({**load_file(words), "text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}, words)
    found = load_file(write_single_file(tmp_path / "folder", tmp_path / "old.safetensors"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("settings", "marks"),
    [
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, set()),
        ({"prediction_type": "v_prediction"}, {"v_pred"}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}),
    ],
    ids=["epsilon", "v", "v of zero SNR"],
)
def test_an_xl_model_that_predicts_v_says_so(settings: dict[str, Any], marks: set[str], tmp_path: Path) -> None:
    pipe = xl(scheduler=diffusers.EulerDiscreteScheduler.from_config(euler().config, **settings))
    pipe.save_pretrained(tmp_path / "folder")
    path = write_single_file(tmp_path / "folder", tmp_path / "model.safetensors")
    assert {key for key in keys(path) if "." not in key} == marks
    if len(marks) == 2:
        assert_same(stock_reads(path, tmp_path / "folder", type(pipe)), pipe)


# The names are those in the standard's own list.
SPECS = {
    ("sd15", "epsilon"): ("stable-diffusion-v1", "epsilon", "512x512"),
    ("sd21", "v_prediction"): ("stable-diffusion-v2-768-v", "v", "768x768"),
    ("sd21", "epsilon"): ("stable-diffusion-v2-512", "epsilon", "768x768"),
    ("sdxl", "epsilon"): ("stable-diffusion-xl-v1-base", "epsilon", "1024x1024"),
    ("refiner", "epsilon"): ("stable-diffusion-xl-v1-refiner", "epsilon", "1024x1024"),
    ("sd15", "flow_prediction"): None,
    ("sd15", None): None,
    ("inpainting", "epsilon"): None,
    ("ssd-1b", "epsilon"): None,
}


@pytest.mark.parametrize(("family", "prediction"), SPECS)
def test_the_header_names_a_released_architecture(family: str, prediction: str | None) -> None:
    config = UNetConfig.from_diffusers(FAMILIES[family])
    found = modelspec(config, {"prediction_type": prediction} if prediction else {}, "a title")
    expected = SPECS[family, prediction]
    if expected is None:
        assert found == {}
        return
    keys = ("modelspec.architecture", "modelspec.prediction_type", "modelspec.resolution")
    assert tuple(found[key] for key in keys) == expected
    assert found["modelspec.sai_model_spec"] == "1.0.0" and found["modelspec.title"] == "a title"
    assert found["modelspec.implementation"] and all(isinstance(value, str) for value in found.values())


def test_the_file_of_another_architecture_claims_nothing(tmp_path: Path) -> None:
    sd1().save_pretrained(tmp_path / "folder")
    with safe_open(write_single_file(tmp_path / "folder", tmp_path / "model.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    sd1().save_pretrained(root / "sd1")
    xl().save_pretrained(root / "xl")
    return {name: root / name for name in ("sd1", "xl")}


def changed(folder: Path, out: Path, file: str, **changes: Any) -> Path:
    """A copy of the folder, by links, with other values in one of its JSON files."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
    value = json.loads((out / file).read_text()) | changes
    (out / file).unlink()
    (out / file).write_text(json.dumps(value))
    return out


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "pixels": ("sd1", "model_index.json", {"_class_name": "PixelTextToImagePipeline"}, "PixelTextToImagePipeline"),
    "kolors": ("xl", "model_index.json", {"_class_name": "KolorsPipeline"}, "KolorsPipeline"),
    "no-autoencoder": ("sd1", "model_index.json", {"vae": [None, None]}, "vae"),
    "another-autoencoder": ("sd1", "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
    "no-text": ("sd1", "model_index.json", {"text_encoder": [None, None]}, "text_encoder"),
    "no-second-text": ("xl", "model_index.json", {"text_encoder_2": [None, None]}, "text_encoder_2"),
    "xl-named-sd": ("xl", "model_index.json", {"_class_name": "StableDiffusionPipeline"}, "addition_embed_type"),
    "activation": ("sd1", "text_encoder/config.json", {"hidden_act": "gelu_new"}, "gelu_new"),
    "xl-activation": ("xl", "text_encoder_2/config.json", {"hidden_act": "quick_gelu"}, "hidden_act"),
    "text-size": ("sd1", "text_encoder/config.json", {"num_hidden_layers": 3}, "layers.2"),
    "text-nonsense": ("sd1", "text_encoder/config.json", {"num_hidden_layers": "x"}, "text_encoder/config.json"),
    "vae-attention": ("sd1", "vae/config.json", {"mid_block_add_attention": False}, "mid_block_add_attention"),
    "vae-quant": ("sd1", "vae/config.json", {"use_quant_conv": False}, "use_quant_conv"),
    "vae-blocks": (
        "sd1",
        "vae/config.json",
        {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
        "AttnDownEncoderBlock2D",
    ),
    "unet-size": ("sd1", "unet/config.json", {"cross_attention_dim": 32}, "attn2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_original_layout_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, file, changes, named = REFUSED[name]
    folder = changed(folders[kind], tmp_path / "folder", file, **changes)
    with pytest.raises(InputError, match=named) as error:
        write_single_file(folder, tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


UNETS: dict[str, dict[str, Any]] = {
    "class": {"num_class_embeds": 7},
    "class_embed_type": {"class_embed_type": "timestep"},
    "time_cond_proj_dim": {"time_cond_proj_dim": 8},
    "encoder_hid_dim": {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
    "mid_block_type": {"mid_block_type": None},
    "layers_per_block": {"layers_per_block": [1, 2]},
    "cross_attention_dim": {"cross_attention_dim": [24, 24]},
    "resnet_time_scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "time_embedding_dim": {"time_embedding_dim": 48},
}


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_that_the_original_code_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    sd1({**SD1, **UNETS[name]}).save_pretrained(tmp_path / "folder")
    with pytest.raises(InputError, match=name):
        write_single_file(tmp_path / "folder", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_missing_part_another_name_and_a_weight_too_large(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model_index\.json"):
        write_single_file(tmp_path, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="safetensors"):
        write_single_file(folders["sd1"], tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"fp16\.safetensors"):
        write_single_file(folders["sd1"], tmp_path / "model.safetensors", variant="fp16")
    pipe = sd1()
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] = 1e6
    pipe.save_pretrained(tmp_path / "folder")
    with pytest.raises(InputError, match=r"input_blocks\.0\.0\.bias does not fit"):
        write_single_file(tmp_path / "folder", tmp_path / "model.safetensors", dtype=torch.float16)
    assert not list(tmp_path.glob("*.safetensors"))
