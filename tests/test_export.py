"""A run made into a model folder that the stock classes load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_run import image_folder, tiny_config

from diffusion_unet.errors import InputError, SaveError
from diffusion_unet.model import DiffusionModel
from training import checkpoint, export, exporting, train
from training.card import write_scores
from training.evaluate import prompt_accuracy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    config = tiny_config(
        folder,
        image_folder(folder / "squares"),
        "--validation.validation_prompts=[a red square]",
        "--validation.validation_steps=2",
        "--data.license=CC0-1.0",
        max_train_steps=4,
    )
    return train(config, preview=lambda model, prompts, seeds: [Image.new("RGB", (8, 8))] * len(seeds), progress=False)


def trained(run: Path, name: str) -> dict[str, torch.Tensor]:
    found = checkpoint.load(run)
    assert found
    return {key.removeprefix("unet."): value for key, value in found.tensors[name].items() if key.startswith("unet.")}


def test_the_stock_classes_load_it_and_give_the_same_numbers(run: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    out = export(run, tmp_path / "model")
    model = DiffusionModel.load(out)
    assert model.text
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(out / "text_encoder").eval()
    unet = UNet2DConditionModel.from_pretrained(out / "unet").eval()
    ids = tokenizer(["a red square"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        context = encoder(ids).last_hidden_state
        stock = unet(x, torch.tensor(300.5), context).sample
        conditioning = model.text.encode(["a red square"])
        ours = model.unet(x, 300.5, conditioning.context)
    assert conditioning.context is not None
    torch.testing.assert_close(conditioning.context, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_which_weights(run: Path, tmp_path: Path) -> None:
    for ema, name in ((None, "ema_0.9"), ("0.9", "ema_0.9"), ("none", "model")):
        out = export(run, tmp_path / str(ema), ema=ema)
        written = load_file(out / "unet/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(written[key], value) for key, value in trained(run, name).items())
    with pytest.raises(InputError, match=r"no averaged weights named '0.5'; there are 0.9, none"):
        export(run, tmp_path / "other", ema="0.5")
    assert not (tmp_path / "other").exists()


def test_half_precision_variant(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "model", dtype="fp16", variant="fp16")
    written = load_file(out / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(written[key], value.half()) for key, value in trained(run, "ema_0.9").items())
    assert load_file(out / "text_encoder/model.fp16.safetensors")
    with pytest.raises(InputError, match="dtype fp8 is not known; it is one of fp32, fp16, bf16"):
        export(run, tmp_path / "model", dtype="fp8")


def test_the_card_tells_how_it_came_about(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "squares-model")
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for part in (
        "# squares-model",
        "![a red square](grid.png)",
        "16 in 4 steps of 4",
        "squares, 12 images",
        "CC0-1.0",
        "v_prediction",
        "moving average, 0.9",
        "learning_rate: 0.001",
        "PixelTextToImagePipeline.from_pretrained('squares-model')",
    ):
        assert part in card, part
    assert str(run.parent) not in card
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"{sum(losses) / 4:.4f}, mean of the last" in card
    with Image.open(out / "grid.png") as grid, Image.open(run / "previews/step_000004.png") as preview:
        assert grid.tobytes() == preview.tobytes()


def test_a_damaged_newest_checkpoint_is_passed_over(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.copytree(copy / "checkpoint-4", copy / "checkpoint-9")
    (copy / "checkpoint-9/model.safetensors").write_bytes(b"torn")
    assert export(copy, tmp_path / "model").is_dir()


def test_the_card_is_of_the_checkpoint_and_not_of_later_steps(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1e6}\n{"step": 6, "lo')
    (copy / "previews/step_000005.png").write_bytes(b"later")
    (copy / "previews/step_x.png").write_bytes(b"other")
    for name in ("README.md", "grid.png"):
        assert (export(copy, tmp_path / "m") / name).read_bytes() == (export(run, tmp_path / "m") / name).read_bytes()


def test_a_folder_of_pictures_becomes_a_model_that_draws(run: Path, tmp_path: Path) -> None:
    from diffusion_unet.cli import main

    export(run, tmp_path / "model")
    words = ["sample", tmp_path / "model", "a red square", "--steps", "2", "--seeds", "0-1", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) >= 2
    with Image.open(pictures[0]) as picture:
        assert picture.size == (8, 8) and picture.mode == "RGB"


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such run folder"):
        export(tmp_path / "none", tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no checkpoint there"):
        export(tmp_path / "empty", tmp_path / "model")


def test_what_was_written_is_compared(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = DiffusionModel.load

    def spoiled(folder: Path, **given: object) -> DiffusionModel:
        model = load(folder, **given)  # type: ignore[arg-type]
        if "variant" in given:
            next(model.unet.parameters()).data.view(-1)[0] += 1e-3
        return model

    monkeypatch.setattr(exporting.DiffusionModel, "load", spoiled)
    with pytest.raises(SaveError, match="not the model that was written"):
        export(run, tmp_path / "model")


def test_prompt_accuracy() -> None:
    class Brightest(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.dtype == torch.uint8
            mean = images.float().flatten(1).mean(1) * self.scale
            return torch.stack([127 - mean, mean - 127], dim=1)

    images = [Image.new("L", (4, 4), value) for value in (0, 255, 10, 200)] * 40
    assert prompt_accuracy(images, [0, 1, 0, 1] * 40, Brightest()) == 1.0
    assert prompt_accuracy(images, [0, 0, 0, 1] * 40, Brightest()) == 0.75
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8).numpy()
    assert prompt_accuracy(pixels, [0, 1, 1], Brightest()) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="no images"):
        prompt_accuracy([], [], Brightest())


def test_scores_go_into_the_card_and_replace_those_before(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "model")
    before = (out / "README.md").read_text()
    for scores in ({"kid": 0.25}, {"kid": 0.125, "images": 3}):
        write_scores(out / "README.md", scores)
        text = (out / "README.md").read_text()
        assert text.startswith(before.rstrip()) and text.count("## Scores") == 1
        assert json.loads(text.partition("```json\n")[2].partition("```")[0]) == scores
    with pytest.raises(InputError, match="there is no card"):
        write_scores(tmp_path / "README.md", {})


def test_the_first_average_is_the_one_that_is_exported(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    config = tiny_config(tmp_path, images, "--train.ema=[power-0.2, '0.5']", max_train_steps=4)
    run = train(config, progress=False)
    for ema, name in ((None, "ema_power-0.2"), ("0.5", "ema_0.5"), ("none", "model")):
        written = load_file(export(run, tmp_path / str(ema), ema=ema) / "unet/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(written[key], value) for key, value in trained(run, name).items())


def test_a_learned_weight_is_trained_and_left_behind(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    plain, learned = (
        tiny_config(tmp_path / str(on), images, f"--objective.learned_weighting={str(on).lower()}", max_train_steps=4)
        for on in (False, True)
    )
    for config in (plain, learned):
        train(config, progress=False)
    one, other = (checkpoint.load(tmp_path / name / "run") for name in ("False", "True"))
    assert one and other
    assert set(other.tensors["model"]) - set(one.tensors["model"]) == {"uncertainty.weight", "uncertainty.bias"}
    assert other.tensors["model"]["uncertainty.bias"].abs() > 0 and "uncertainty.bias" not in other.tensors["ema_0.9"]
    files = [path.name for path in export(tmp_path / "True/run", tmp_path / "model").rglob("*.safetensors")]
    assert len(files) == 2 and DiffusionModel.load(tmp_path / "model")
