"""The shipped recipes: each trains for three steps on a tiny model, and stock diffusers loads what is exported."""

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import diffusers
import numpy as np
import pytest
import tiny_models
import tiny_pipelines as tiny
import torch
import yaml
from PIL.Image import Image
from safetensors.torch import load_file
from tiny_adapters import assert_same, predict, read
from torch import Tensor

from diffusion_unet.model import DiffusionModel
from diffusion_unet.pipeline import PixelTextToImagePipeline
from diffusion_unet.single_file import write_single_file
from sampling import sample
from training import checkpoint, export, train
from training.config import Config, load_config
from training.network import Network
from training.start import BASE, untrained

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STEPS = 3
SMALL = {  # any recipe at a size where a step takes milliseconds; all else is as it is shipped
    "data.resolution": tiny.SIZE,
    "data.min_size": 1,
    "data.max_bad_fraction": 0,
    "optimizer.lr_warmup_steps": 0,
    "train.max_train_steps": STEPS,
    "train.train_batch_size": 4,
    "train.gradient_accumulation_steps": 2,
    "train.mixed_precision": "no",
    "validation.num_validation_images": 1,
}
FAST = {"optimizer.learning_rate": 0.05}  # so that three steps of what begins at zero are seen


@dataclass(frozen=True)
class Run:
    config: Config
    folder: Path

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What the checkpoint holds, by file."""
        found = checkpoint.load(self.folder)
        assert found is not None and found.state["step"] == STEPS
        return dict(found.tensors)

    def model(self) -> DiffusionModel:
        """The model as it was trained: all of what the checkpoint holds, put where training had it."""
        model, given = untrained(self.config), self.tensors["model"]
        parameters = Network(model, self.config).trained()
        assert parameters.keys() == given.keys()
        for name, parameter in parameters.items():
            parameter.data.copy_(given[name])
        return model

    def export(self, **settings: Any) -> Path:
        out = self.folder.parent / "-".join(["out", *map(str, settings.values())])
        return export(self.folder, out, **settings)


def preview(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image]:
    """As the command line has it."""
    return sample(model, prompts, seeds=seeds, steps=1)


def run(recipe: str, folder: Path, *sections: dict[str, Any], **more: Any) -> Run:
    """Trains a shipped recipe; `sections` and `more` are settings on top of it, a section's dot spelled __ in these."""
    path = CONFIGS / f"{recipe}.yaml"
    shipped = yaml.safe_load(path.read_text())
    settings = SMALL | {"train.output_dir": str(folder / "run")}
    if shipped["data"].get("aspect_buckets"):
        settings["data.bucket_step"] = 4
    if shipped["data"].get("held_out"):
        settings["data.held_out"] = 2
    if shipped["validation"].get("validation_prompts"):
        settings["validation.validation_prompts"] = ["boot"]
    for section in sections:
        settings |= section
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    config = load_config(path, [f"--{key}={_text(value)}" for key, value in settings.items()])
    train(config, preview=preview, progress=False)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses) == STEPS and all(math.isfinite(loss) and loss != 0 for loss in losses)
    return Run(config, folder / "run")


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def narrow(recipe: str, **changes: Any) -> dict[str, Any]:
    """The new networks of a recipe, with as many levels, and less else."""
    model = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())["model"]
    levels = len(model["unet"]["block_out_channels"])
    unet: dict[str, Any] = {"block_out_channels": [8] * levels, "norm_num_groups": 4, "attention_head_dim": 2}
    unet |= {"layers_per_block": 1, "transformer_layers_per_block": 1, **changes}
    settings = {f"model.unet.{key}": value for key, value in unet.items()}
    if model.get("text_encoder"):
        settings |= {"model.text_encoder.hidden_size": 16, "model.unet.cross_attention_dim": 16}
        settings |= {"model.text_encoder.num_hidden_layers": 1, "model.text_encoder.num_attention_heads": 2}
        settings |= {"model.tokenizer.vocab_size": 560, "model.tokenizer.max_length": tiny.LENGTH}
    return settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], Path]], Path]:
    """The folder that a function of tiny_models makes, which is made once."""
    return functools.cache(lambda make: make(tmp_path_factory.mktemp("made") / "folder"))


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets' own files stay in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    """Of a text encoder with the names of transformers' newer versions."""
    (file,) = (folder / part).glob("*.safetensors")
    return {key.removeprefix("text_model."): value for key, value in load_file(file).items()}


def moved(before: Path, after: Path, part: str) -> Literal["all", "some", "none"]:
    """Which of the matrices and kernels of a part differ between two model folders."""
    one, other = weights(before, part), weights(after, part)
    assert one.keys() == other.keys()
    different = [not torch.equal(one[key], other[key]) for key in one if one[key].ndim > 1]
    return "all" if all(different) else "some" if any(different) else "none"


def opened(folder: Path, kind: str) -> Any:
    """The folder as anybody opens it, by diffusers alone."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipe).__name__ == kind
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draws(pipe: Any, prompt: str = tiny.PROMPT, **call: Any) -> None:
    """One step of the pipeline gives a picture, and no flat one; of a picture, one of its size."""
    size = {} if "image" in call else {"height": tiny.SIZE, "width": tiny.SIZE}
    given = {"num_inference_steps": 1, "output_type": "np", **size, **call}
    picture = np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(0), **given).images, dtype=float)
    assert picture.shape == (1, tiny.SIZE, tiny.SIZE, 3)
    assert np.isfinite(picture).all() and np.ptp(picture) > 0


# ---- from nothing --------------------------------------------------------------------------------------------------


def draws_pixels(folder: Path, prompt: str) -> None:
    pipe = PixelTextToImagePipeline.from_pretrained(folder)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    pipe.set_progress_bar_config(disable=True)
    draws(pipe, prompt)


def test_pixels_from_captions(made: Any, tmp_path: Path) -> None:
    data = made(tiny_models.captioned_images)
    trained = run("emoji-32", tmp_path, narrow("emoji-32"), data__train_data_dir=data)
    out = trained.export()
    assert {moved(trained.folder / BASE, out, part) for part in ("unet", "text_encoder")} == {"all"}
    draws_pixels(out, tiny.PROMPT)


def test_pixels_from_nothing_said(made: Any, tmp_path: Path) -> None:
    data, recipe = made(tiny_models.plain_images), "pixels-unconditional"
    trained = run(recipe, tmp_path, narrow(recipe), data__train_data_dir=data, objective__loss="huber")
    of_training_alone = trained.tensors["model"].keys() - trained.tensors["ema_power-0.10"].keys()
    assert of_training_alone == {"uncertainty.weight", "uncertainty.bias"}
    folders = [trained.export(), *(trained.export(ema=name) for name in ("power-0.10", "power-0.15", "none"))]
    assert moved(trained.folder / BASE, folders[0], "unet") == "all"
    assert all(moved(one, other, "unet") == "all" for one, other in itertools.combinations(folders, 2))
    draws_pixels(folders[0], "")


@pytest.mark.parametrize("middle", ["UNetMidBlock2D", "UNetMidBlock2DCrossAttn"])  # which attends to the picture itself
def test_pixels_of_classes_by_a_schedule_free_optimizer(middle: str, made: Any, tmp_path: Path) -> None:
    data, recipe = made(tiny_models.sorted_images), "pixels-class-conditional"
    settings = narrow(recipe, num_class_embeds=3, mid_block_type=middle)
    prompts = {"validation__validation_prompts": ["boot", "bag"]}
    trained = run(recipe, tmp_path, settings, data__train_data_dir=data, **prompts)
    out = trained.export()
    assert moved(trained.folder / BASE, out, "unet") == moved(out, trained.export(ema="none"), "unet") == "all"
    assert DiffusionModel.load(out).class_names == ("bag", "boot")
    names = load_file(out / "unet/diffusion_pytorch_model.safetensors").keys()
    assert any("attn1" in name for name in names) == (middle == "UNetMidBlock2DCrossAttn")
    draws_pixels(out, "boot")


def test_latents_from_tars(made: Any, tmp_path: Path) -> None:
    data, vae, recipe = made(tiny_models.tars), made(tiny_models.save_sd1) / "vae", "latents-from-nothing"
    trained = run(recipe, tmp_path, narrow(recipe), model__vae=vae, data__train_data_dir=data)
    out = trained.export()
    assert {moved(trained.folder / BASE, out, part) for part in ("unet", "text_encoder")} == {"all"}
    assert moved(vae.parent, out, "vae") == "none"
    draws(opened(out, "StableDiffusionPipeline"))


def test_latents_of_a_pretrained_text_encoder(made: Any, tmp_path: Path) -> None:
    data = tiny_models.parquet(tmp_path / "data", "jpg", caption="txt")
    base, recipe = made(tiny_models.save_sd1), "latents-clip"
    given = {"vae": base / "vae", "pretrained_text_encoder": base, "unet.cross_attention_dim": tiny.CONTEXT_WIDTH}
    settings = {f"model.{key}": value for key, value in given.items()}
    local = {"dataset_name": None, "streaming": None, "train_data_dir": data, "cache_dir": tmp_path / "cache"}
    settings |= {f"data.{key}": value for key, value in local.items()}
    trained = run(recipe, tmp_path, narrow(recipe), settings)
    out = trained.export()
    assert moved(trained.folder / BASE, out, "unet") == "all"
    assert moved(base, out, "text_encoder") == moved(base, out, "vae") == "none"
    pipe = opened(out, "StableDiffusionPipeline")
    assert pipe.scheduler.config.rescale_betas_zero_snr and pipe.scheduler.config.prediction_type == "v_prediction"
    draws(pipe)


# ---- fine-tuning of the whole --------------------------------------------------------------------------------------

TRAINED_TEXT = {"model.train_text_encoder": True, "data.cache_text": False}
ADAMW = {"optimizer.optimizer": "torch.optim:AdamW", "optimizer.optimizer_args": None}


@pytest.mark.parametrize("text", [False, True])
def test_sd15(text: bool, made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sd1), made(tiny_models.captioned_images)
    settings = TRAINED_TEXT | {"optimizer.text_encoder_lr": 1e-6} if text else {}
    out = run("sd15-finetune", tmp_path, settings, model__pretrained=base, data__train_data_dir=data).export()
    assert moved(base, out, "unet") == "all" and moved(base, out, "vae") == "none"
    assert moved(base, out, "text_encoder") == ("all" if text else "none")
    draws(opened(out, "StableDiffusionPipeline"))


def test_sd15_from_a_single_file_to_a_single_file(made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sd1), made(tiny_models.captioned_images)
    file = write_single_file(base, tmp_path / "model.safetensors")
    configs = tiny_models.without_weights(base, tmp_path / "configs")
    model = {"model.pretrained": file, "model.pretrained_config": configs}
    trained = run("sd15-finetune", tmp_path, model, data__train_data_dir=data)
    out = trained.export()
    assert moved(base, out, "unet") == "all" and moved(base, out, "text_encoder") == moved(base, out, "vae") == "none"
    single = export(trained.folder, tmp_path / "tuned.safetensors", layout="single-file")
    cls = diffusers.StableDiffusionPipeline
    stock = cls.from_single_file(str(single), config=str(configs), local_files_only=True, safety_checker=None)
    written = weights(out, "unet")
    assert all(torch.equal(value, written[key]) for key, value in stock.unet.state_dict().items())


def test_sd21_with_zero_terminal_snr(made: Any, tmp_path: Path) -> None:
    base = tiny_models.save_sd2(tmp_path / "base")
    data = made(tiny_models.captioned_images)
    trained = run("sd21-finetune", tmp_path, model__pretrained=base, data__train_data_dir=data)
    assert len({tuple(row.shape) for row in _kept(trained.folder / "cache" / "latents")}) > 1  # aspect ratios
    out = trained.export()
    assert moved(base, out, "unet") == "all" and moved(base, out, "text_encoder") == moved(base, out, "vae") == "none"
    pipe = opened(out, "StableDiffusionPipeline")
    assert pipe.scheduler.config.rescale_betas_zero_snr and pipe.scheduler.config.prediction_type == "v_prediction"
    draws(pipe)


def _kept(folder: Path) -> list[Tensor]:
    return [value for file in folder.rglob("*.safetensors") for value in load_file(file).values()]


@pytest.mark.parametrize("text", [False, True])
def test_sdxl(text: bool, made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sdxl), made(tiny_models.captioned_images)
    settings = TRAINED_TEXT | ADAMW if text else {}
    trained = run("sdxl-finetune", tmp_path, settings, model__pretrained=base, data__train_data_dir=data)
    out = trained.export()
    assert moved(base, out, "unet") == "all" and moved(base, out, "vae") == "none"
    # Of the first encoder the layer before the last is read, so that half of its two are trained.
    expected = ["some", "all"] if text else ["none", "none"]
    assert [moved(base, out, part) for part in ("text_encoder", "text_encoder_2")] == expected
    draws(opened(out, "StableDiffusionXLPipeline"))


# ---- adapters, words -----------------------------------------------------------------------------------------------


def assert_stock_agrees(trained: Run, base: Path, out: Path, *, text: bool) -> None:
    """The stock pipeline with the exported file predicts what was trained, and not what it did before."""
    model, xl = trained.model(), "2" if (base / "text_encoder_2").is_dir() else ""
    config = tiny.XL if xl else tiny.SD
    pipe = opened(base, "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline")
    encoders = [(getattr(pipe, name), part.model) for name, part in model.text.encoders.items()]  # type: ignore[union-attr]
    before, words = predict(pipe.unet, config), [read(stock) for stock, _ in encoders]
    pipe.load_lora_weights(out)
    assert_same(predict(pipe.unet, config), predict(model.unet, config))
    assert not torch.allclose(predict(pipe.unet, config), before, atol=1e-3)
    for (stock, ours), word in zip(encoders, words, strict=True):
        assert_same(read(stock), read(ours))
        assert torch.allclose(read(stock), word, atol=1e-3) != text
    draws(pipe)


def test_sd15_lora_in_both_layouts(made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sd1), made(tiny_models.captioned_images)
    trained = run("sd15-lora", tmp_path, FAST, model__pretrained=base, data__train_data_dir=data)
    assert all(".lora_" in name for name in trained.tensors["model"])
    for layout in ("diffusers", "kohya"):
        assert_stock_agrees(trained, base, trained.export(layout=layout), text=False)


def test_sd15_dora_of_text_encoder_too(made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sd1), made(tiny_models.captioned_images)
    settings = FAST | TRAINED_TEXT | {"model.adapter.kind": "dora"}
    trained = run("sd15-lora", tmp_path, settings, model__pretrained=base, data__train_data_dir=data)
    assert any(".lora_magnitude_vector." in name for name in trained.tensors["model"])
    assert_stock_agrees(trained, base, trained.export(), text=True)


def test_sdxl_lora_of_tags_by_prodigy_in_both_layouts(made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sdxl), made(tiny_models.tagged_images)
    settings = {"optimizer.learning_rate": 1e4}  # Prodigy begins at a millionth
    trained = run("sdxl-lora", tmp_path, settings, model__pretrained=base, data__train_data_dir=data)
    for layout in ("diffusers", "kohya"):
        assert_stock_agrees(trained, base, trained.export(layout=layout), text=True)


def test_dreambooth_draws_the_class_itself(made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sd1), made(tiny_models.plain_images)
    told = {"instance_prompt": "sks boot", "class_prompt": "a boot", "num_class_images": 3}
    settings = FAST | {f"data.{key}": value for key, value in told.items()}
    settings |= {"data.class_data_dir": tmp_path / "class", "model.pretrained": base}
    trained = run("sd15-dreambooth-lora", tmp_path, settings, data__train_data_dir=data)
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    assert_stock_agrees(trained, base, trained.export(), text=True)


def test_textual_inversion(made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sd1), made(tiny_models.plain_images)
    settings = FAST | {"model.textual_inversion.initializer_token": "a", "data.instance_prompt": "a <my-toy>"}
    prompts = {"validation__validation_prompts": ["a <my-toy>"]}
    trained = run(
        "sd15-textual-inversion", tmp_path, settings, model__pretrained=base, data__train_data_dir=data, **prompts
    )
    (vectors,) = trained.tensors["model"].values()
    assert vectors.shape == (1, tiny.CONTEXT_WIDTH)
    pipe = opened(base, "StableDiffusionPipeline")
    pipe.load_textual_inversion(trained.export())
    said, start, known = (
        pipe.encode_prompt([prompt], "cpu", 1, do_classifier_free_guidance=False)[0].detach()
        for prompt in ("a <my-toy>", "a a", "a boot")
    )
    text = trained.model().text
    assert text is not None
    for prompt, stock in (("a <my-toy>", said), ("a boot", known)):
        ours = text.encode([prompt]).context
        assert ours is not None
        assert_same(ours.detach(), stock)
    assert not torch.allclose(said, start, atol=1e-2)
    draws(pipe, "a <my-toy>")


# ---- from a picture to a picture -----------------------------------------------------------------------------------


def widened(base: Path, out: Path, channels: int) -> None:
    """All of the U-Net was trained, its new inputs too, and nothing else."""
    before, after = weights(base, "unet"), weights(out, "unet")
    had, wide = before.pop("conv_in.weight"), after.pop("conv_in.weight")
    assert wide.shape[1] == channels and wide[:, 4:].any() and not torch.equal(wide[:, :4], had)
    assert all(not torch.equal(after[key], value) for key, value in before.items() if value.ndim > 1)
    assert moved(base, out, "text_encoder") == moved(base, out, "vae") == "none"


def test_inpainting(made: Any, tmp_path: Path) -> None:
    base, data = made(tiny_models.save_sd1), made(tiny_models.captioned_images)
    out = run("sd15-inpaint", tmp_path, model__pretrained=base, data__train_data_dir=data).export()
    widened(base, out, 9)
    draws(opened(out, "StableDiffusionInpaintPipeline"), image=tiny.picture(0), mask_image=tiny.mask(), strength=1.0)


def test_instruct_pix2pix(made: Any, tmp_path: Path) -> None:
    base = made(tiny_models.save_sd1)
    data = tiny_models.parquet(tmp_path / "data", "original_image", "edited_image", caption="edit_prompt")
    out = run("sd15-instruct-pix2pix", tmp_path, model__pretrained=base, data__train_data_dir=data).export()
    widened(base, out, 8)
    draws(opened(out, "StableDiffusionInstructPix2PixPipeline"), image=tiny.picture(0))
