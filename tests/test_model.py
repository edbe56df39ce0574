"""A model folder: written is what is read, here and by the stock classes; whole or absent; nothing foreign gets in."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_unet import model as model_module
from diffusion_unet.codec import LatentCodec, PixelCodec
from diffusion_unet.conditioning import new_text_encoder, train_tokenizer
from diffusion_unet.config import UNetConfig
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError, SaveError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet

PROMPTS = ["a photo of a sneaker", ""]
TINY = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def tiny(seed: int = 0, **changes: object) -> UNet:
    torch.manual_seed(seed)
    return UNet(UNetConfig.from_diffusers(TINY | changes)).eval()


def text_encoder() -> torch.nn.Module:
    tokenizer = train_tokenizer(["a photo of a sneaker", "an image showing a sandal"], 560, 12)
    return new_text_encoder(tokenizer, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).eval()


@pytest.fixture(scope="module")
def pixels() -> DiffusionModel:
    schedule = NoiseSchedule.cosine(prediction_type="v_prediction")
    return DiffusionModel(tiny(), schedule, text_encoder(), PixelCodec(1, -0.43, 0.7))


@pytest.fixture(scope="module")
def latents() -> DiffusionModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    unet = tiny(in_channels=4, out_channels=4, sample_size=[8, 12])
    # StableDiffusionPipeline warns of another offset than 1, though with trailing steps it has no part in anything
    schedule = NoiseSchedule.from_config(NoiseSchedule.scaled_linear().to_config() | {"steps_offset": 1})
    return DiffusionModel(unet, schedule, text_encoder(), LatentCodec(vae))


@pytest.fixture(scope="module")
def folder(pixels: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pixels.save(tmp_path_factory.mktemp("out") / "model", card="# A model\n", files={"grid.png": b"picture"})


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def denoised(model: DiffusionModel) -> torch.Tensor:
    x = torch.randn(2, model.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.denoiser()(x, 0.7, model.text.encode(PROMPTS))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- there and back ------------------------------------------------------------------------------------------------


def test_pixel_model_returns_from_its_folder(pixels: DiffusionModel, folder: Path) -> None:
    loaded = DiffusionModel.load(folder)
    assert torch.allclose(denoised(loaded), denoised(pixels), atol=1e-5)
    assert loaded.codec == pixels.codec and loaded.image_size == (16, 16)
    assert loaded.schedule.to_config() == pixels.schedule.to_config()
    assert loaded.unet.config == pixels.unet.config
    assert not any(part.training for part in (loaded.unet, loaded.text))
    assert isinstance(loaded.denoiser(), Denoiser)
    assert loaded.fingerprint() == pixels.fingerprint()
    assert set(contents(folder)) == {
        "README.md",
        "grid.png",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert (folder / "README.md").read_text() == "# A model\n"
    assert os.listdir(folder.parent) == ["model"]


def test_stock_classes_give_the_same_numbers(pixels: DiffusionModel, folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    unet, report = UNet2DConditionModel.from_pretrained(
        folder / "unet", low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(report.values())
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        context = text(ids)[0]
        output = unet(x, 321, encoder_hidden_states=context).sample
        assert torch.allclose(context, pixels.text.encode(PROMPTS).context, atol=1e-6)
        assert torch.allclose(output, pixels.unet(x, 321, context), atol=1e-5)
    scheduler.set_timesteps(1000)
    clean = scheduler.step(output, 321, x).pred_original_sample
    sigma = pixels.schedule.sigma(321)
    x_of_sigma = (x * (1 + sigma**2).sqrt()).float()
    with torch.no_grad():
        ours = pixels.denoiser()(x_of_sigma, float(sigma), pixels.text.encode(PROMPTS))
    assert torch.allclose(clean, ours, atol=1e-4)


def test_latent_model_loads_whole_in_stock_diffusers(latents: DiffusionModel, tmp_path: Path) -> None:
    folder = latents.save(tmp_path / "model")
    loaded = DiffusionModel.load(folder)
    assert torch.allclose(denoised(loaded), denoised(latents), atol=1e-5)
    assert loaded.image_size == (16, 24) and loaded.fingerprint() == latents.fingerprint()
    z = torch.randn(1, 4, 8, 12)
    assert torch.equal(loaded.codec.decode(z), latents.codec.decode(z))
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.safety_checker is None and isinstance(pipe.vae, AutoencoderKL)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(PROMPTS[0], height=16, width=24, latents=z, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 24, 3)


def test_dtype_and_variant(pixels: DiffusionModel, tmp_path: Path) -> None:
    before = pixels.fingerprint()
    folder = pixels.save(tmp_path / "model", dtype=torch.float16, variant="fp16")
    assert pixels.fingerprint() == before
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    half = DiffusionModel.load(folder, variant="fp16")
    assert {p.dtype for part in (half.unet, half.text) for p in part.parameters()} == {torch.float16}
    assert half.fingerprint() != before
    wide = DiffusionModel.load(folder, variant="fp16", dtype=torch.float32, device="cpu")
    assert {p.dtype for part in (wide.unet, wide.text) for p in part.parameters()} == {torch.float32}
    assert torch.allclose(denoised(wide), denoised(pixels), atol=0.05)
    assert wide.to(dtype=torch.float64) is wide and wide.unet.dtype == torch.float64
    assert DiffusionModel.load(folder).fingerprint() == half.fingerprint()  # there is no other
    for word in ("bf16", "fp16"):
        (folder / "unet" / f"diffusion_pytorch_model.{word}.safetensors").touch()
    with pytest.raises(InputError, match=r"weights of several variants \(bf16, fp16\): name the one to take"):
        DiffusionModel.load(folder)
    shutil.rmtree(folder)
    pixels.save(folder)
    large = DiffusionModel(tiny(1), pixels.schedule, pixels.text, pixels.codec)
    with torch.no_grad():
        large.unet.conv_in.bias[3] = 1e6
    with pytest.raises(InputError, match=r"conv_in\.bias does not fit"):
        large.save(tmp_path / "large", dtype=torch.float16)
    assert os.listdir(tmp_path) == ["model"]


def test_a_model_without_text(tmp_path: Path, pixels: DiffusionModel) -> None:
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = tiny(mid_block_type="UNetMidBlock2D", **blocks)
    folder = DiffusionModel(unet, pixels.schedule, None, PixelCodec(1)).save(tmp_path / "model")
    loaded = DiffusionModel.load(folder)
    x = torch.randn(1, 1, 8, 8)
    assert loaded.text is None
    with torch.no_grad():
        assert torch.allclose(loaded.denoiser()(x, 1.0), Denoiser(unet, pixels.schedule)(x, 1.0), atol=1e-5)
    assert not (folder / "tokenizer").exists()


def test_fingerprint_is_of_everything(pixels: DiffusionModel) -> None:
    others = [
        dataclasses.replace(pixels, unet=tiny(1)),
        dataclasses.replace(pixels, schedule=NoiseSchedule.cosine()),
        dataclasses.replace(pixels, codec=PixelCodec(1, -0.42, 0.7)),
        dataclasses.replace(pixels, text=text_encoder()),
    ]
    with torch.no_grad():
        others[-1].text.model.final_layer_norm.bias[0] += 1e-6
    assert len({model.fingerprint() for model in [pixels, *others]}) == 5


# ---- whole or absent -----------------------------------------------------------------------------------------------


def test_a_model_is_replaced_by_a_whole_one(pixels: DiffusionModel, copy: Path) -> None:
    other = dataclasses.replace(pixels, unet=tiny(1))
    (copy / "unet" / "stale.bin").write_bytes(b"old")
    other.save(copy, card="# Another\n")
    assert DiffusionModel.load(copy).fingerprint() == other.fingerprint()
    assert not (copy / "unet" / "stale.bin").exists() and (copy / "README.md").read_text() == "# Another\n"
    assert os.listdir(copy.parent) == ["copy"]


@pytest.mark.parametrize("failure", ["part", "rename", "swap"])
def test_a_failure_leaves_the_old_model(
    failure: str, pixels: DiffusionModel, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = contents(copy), []

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if self.name.endswith(".partial") or failure == "rename":
            full()
        return Path(os.rename(self, target) or target)

    if failure == "part":
        monkeypatch.setattr(model_module, "write_bytes", full)
    else:
        monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(SaveError, match=f"{copy}.*No space left"):
        dataclasses.replace(pixels, unet=tiny(1)).save(copy, card="# New\n")
    assert contents(copy) == before and os.listdir(copy.parent) == ["copy"]
    monkeypatch.undo()
    assert DiffusionModel.load(copy).fingerprint() == pixels.fingerprint()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_for_those_whom_the_umask_lets_in(pixels: DiffusionModel, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        pixels.save(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}


def test_what_a_killed_process_left_is_cleared_away(pixels: DiffusionModel, copy: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (copy.parent / f".copy.{ended.pid}.partial" / "unet").mkdir(parents=True)
    copy.rename(copy.parent / ".copy.old")  # killed between the two renames
    pixels.save(copy)
    assert DiffusionModel.load(copy).fingerprint() == pixels.fingerprint()
    assert os.listdir(copy.parent) == ["copy"]


def test_what_another_process_is_writing_is_left_alone(pixels: DiffusionModel, copy: Path) -> None:
    other = copy.parent / f".copy.{os.getppid()}.partial"
    other.mkdir()
    pixels.save(copy)
    assert other.is_dir() and DiffusionModel.load(copy).fingerprint() == pixels.fingerprint()


@pytest.mark.parametrize("name", ["notes.txt", ".git"])
def test_nothing_foreign_is_lost_with_the_old_model(name: str, pixels: DiffusionModel, copy: Path) -> None:
    (copy / name).write_bytes(b"dear")
    before = contents(copy)
    with pytest.raises(InputError, match=f"{name} is no part of a model and would be lost: move it"):
        pixels.save(copy)
    assert contents(copy) == before and os.listdir(copy.parent) == ["copy"]
    (copy / name).rename(copy / "sample.png")
    pixels.save(copy, files={"sample.png": b"new"})
    assert (copy / "sample.png").read_bytes() == b"new"


def test_only_models_are_replaced(pixels: DiffusionModel, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_bytes(b"dear")
    for name in ("photos", "file"):
        with pytest.raises(InputError, match="no model folder"):
            pixels.save(tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == (tmp_path / "file").read_bytes() == b"dear"
    (tmp_path / "empty").mkdir()
    pixels.save(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    dataclasses.replace(pixels, unet=tiny(1)).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert DiffusionModel.load(tmp_path / "empty").fingerprint() != pixels.fingerprint()


# ---- bad input -----------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        DiffusionModel.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_folders_that_are_no_models(tmp_path: Path, copy: Path) -> None:
    refused(tmp_path / "none", "none is not there; give a model folder")
    refused(tmp_path, "is no model: it holds no model_index.json; give a model folder")
    (tmp_path / "run/checkpoint-5").mkdir(parents=True)
    refused(tmp_path / "run", "run is a training run: make a model of it, `diffusion-unet export ")
    refused(copy / "unet", "is no model")
    refused(copy / "README.md", "is no model")
    (copy / "model_index.json").write_text("[1]")
    refused(copy, r"model_index\.json")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"_class_name": "StableDiffusion3Pipeline"}, "'StableDiffusion3Pipeline' is not known here"),
        ({"_class_name": ["a"]}, "is not known here"),
        ({"unet": ["os", "system"]}, r"unet is \['os', 'system'\]"),
        ({"unet": None}, "unet is None"),
        ({"text_encoder": ["evil", "CLIPTextModel"]}, "text_encoder is"),
        ({"tokenizer": "CLIPTokenizer"}, "tokenizer is 'CLIPTokenizer'"),
        ({"pixel_mean": "0"}, "pixel_mean is '0'"),
        ({"pixel_std": None}, "pixel_std is None"),
        ({"pixel_std": float("nan")}, "is no JSON .*'NaN' is not finite"),
        ({"pixel_std": 10**400}, "is no JSON .*401 digits"),
        ({"pixel_std": 10**39}, "pixel_std is 1000"),
        ({"pixel_std": 0}, "std above 0"),
    ],
)
def test_an_index_that_does_not_fit(copy: Path, changes: dict[str, object], match: str) -> None:
    path = copy / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(copy, match)


@pytest.mark.parametrize("part", ["unet", "scheduler", "text_encoder", "tokenizer"])
def test_missing_parts(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    refused(copy, part)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_truncated_weights(copy: Path, part: str) -> None:
    whole = (copy / part).read_bytes()
    (copy / part).write_bytes(whole[: len(whole) // 2])
    refused(copy, part)


def test_parts_of_different_models(pixels: DiffusionModel, copy: Path, tmp_path: Path) -> None:
    tiny(cross_attention_dim=48).save_pretrained(copy / "unet")
    refused(copy, "context of width 48, and there is a text encoder of width 32")
    tiny(block_out_channels=[32, 32]).save_pretrained(tmp_path / "narrow")
    shutil.copy(tmp_path / "narrow" / "diffusion_pytorch_model.safetensors", copy / "unet")
    refused(copy, "another architecture")
    with pytest.raises(InputError, match="predicts 1 channels, the codec has 3"):
        dataclasses.replace(pixels, codec=PixelCodec(3))
    with pytest.raises(InputError, match="there is no text encoder"):
        dataclasses.replace(pixels, text=None)


def test_no_module_is_imported_for_a_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "evil.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"extra": ["evil", "Evil"], "_module": "evil"}))
    assert DiffusionModel.load(copy).image_size == (16, 16)
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": ["evil", "Evil"]}))
    refused(copy, "not known here")
    assert "evil" not in sys.modules


def test_image_size_is_said_or_asked_for(pixels: DiffusionModel) -> None:
    assert dataclasses.replace(pixels, unet=tiny(sample_size=[8, 24])).image_size == (8, 24)
    with pytest.raises(InputError, match="give the size"):
        _ = dataclasses.replace(pixels, unet=tiny(sample_size=None)).image_size
