"""The quickstart from end to end, shortened: it resumes, trains, exports, draws, scores, and says when it is done."""

import json
import shlex
import socket
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_unet import DiffusionModel, cli

STEPS = 450
# Small enough to learn something on one core in less than a minute.
UNET = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
}
SHORT = {
    "model.unet": UNET,
    "model.text_encoder.hidden_size": 64,
    "model.text_encoder.num_hidden_layers": 1,
    "model.text_encoder.num_attention_heads": 4,
    "data.resolution": 16,
    "optimizer.learning_rate": 2e-3,
    "optimizer.lr_warmup_steps": 50,
    "train.train_batch_size": 16,
    "train.ema": ["0.97"],
    "train.checkpointing_steps": 1000,
    "validation.validation_steps": 1000,
    "validation.num_validation_images": 1,
    "validation.num_inference_steps": 6,
    "validation.guidance_scale": 3,
}
OVERRIDES = [f"--{key}={json.dumps(value)}" for key, value in SHORT.items()]


def no_socket(*_: object, **__: object) -> None:
    raise AssertionError("a socket was opened")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begun by `train` for three steps, and finished by `quickstart`, which draws and scores without the run and
    without a network: from when it loads the model, all but that is out of reach."""
    folder = tmp_path_factory.mktemp("runs") / "quick start"
    run = [*OVERRIDES, f"--train.output_dir={folder}"]
    assert cli.main(["train", "quickstart", *run, "--train.max_train_steps=3"]) == 0
    quickstart = ["quickstart", "--output-dir", str(folder), *OVERRIDES, f"--train.max_train_steps={STEPS}"]
    away = folder.with_name("away")
    away.mkdir()
    with pytest.MonkeyPatch.context() as patch:

        def load(model: Path) -> DiffusionModel:
            assert model == folder / "model"
            patch.setattr(socket, "socket", no_socket)
            for path in list(folder.iterdir()):
                if path != model:
                    path.rename(away / path.name)
            return DiffusionModel.load(model)

        patch.setattr(cli, "load", load)
        assert cli.main(quickstart) == 0
    assert any(away.glob("checkpoint-*"))
    for path in list(away.iterdir()):
        path.rename(folder / path.name)
    return folder


def test_prompts_are_followed_far_above_chance(folder: Path) -> None:
    result = json.loads((folder / "metrics.json").read_text())
    # Of 120 pictures each, of 10 classes: chance is 0.10 with a standard deviation of 0.03.
    assert result["prompt_accuracy"]["trained"] > 0.25
    assert result["prompt_accuracy"]["held_out"] > 0.25
    assert 0.85 < result["ceiling"] < 1
    assert result["images_seen"] == STEPS * 16
    assert result["images_per_second"] > 0 and result["seconds"] >= sum(result["seconds_by_part"].values()) - 0.2
    assert 0.1 < result["peak_memory_gb"] < 3


def test_a_stopped_run_goes_on_and_does_each_step_once(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))


def test_the_pictures_are_one_labelled_grid(folder: Path) -> None:
    with Image.open(folder / "samples.png") as image:
        image.load()
        width, height = image.size
    assert width > 8 * 96 and height > 10 * 96  # 8 seeds, 10 prompts, each enlarged to 96 pixels


def test_stock_classes_load_the_parts_and_give_the_same_numbers(folder: Path) -> None:
    own = DiffusionModel.load(folder / "model")
    assert own.text is not None
    ids, _ = own.text.tokenize(["a photo of a bag"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "model" / "tokenizer")
    length = {"padding": "max_length", "max_length": ids.shape[1], "truncation": True}
    assert tokenizer(["a photo of a bag"], return_tensors="pt", **length).input_ids.tolist() == ids.tolist()
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    unet = UNet2DConditionModel.from_pretrained(folder / "model", subfolder="unet").eval()
    text = CLIPTextModel.from_pretrained(folder / "model", subfolder="text_encoder").eval()
    with torch.no_grad():
        context = own.text(ids).context
        torch.testing.assert_close(text(ids).last_hidden_state, context, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(unet(x, 500, context).sample, own.unet(x, 500, context), rtol=1e-4, atol=1e-5)
    card = (folder / "model" / "README.md").read_text()
    assert "grid.png" in card and (folder / "model" / "grid.png").is_file()


def test_a_second_run_says_that_it_is_finished_and_what_to_type(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = ["quickstart", "--output-dir", str(folder), *OVERRIDES, f"--train.max_train_steps={STEPS}"]
    assert cli.main(again) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    printed = capsys.readouterr().out
    assert "Finished already" in printed and str(folder / "samples.png") in printed
    command = shlex.split(printed[printed.index(" sample ") :])
    arguments = cli._parse(command)
    assert Path(arguments.model) == folder / "model" and arguments.prompts == ["a photo of a sneaker"]


def test_fewer_steps_than_the_run_has_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (3, STEPS - 1):  # there is a checkpoint-3, which is not what would be exported
        fewer = ["quickstart", "--output-dir", str(folder), *OVERRIDES, f"--train.max_train_steps={steps}"]
        assert cli.main(fewer) == 2
        error = capsys.readouterr().err
        assert f"max_train_steps: {steps}" in error and f"checkpoint-{STEPS}" in error and error.count("\n") == 1


def test_another_architecture_in_the_same_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [*OVERRIDES, "--model.unet.block_out_channels=[16, 32, 32]", f"--train.max_train_steps={STEPS}"]
    assert cli.main(["quickstart", "--output-dir", str(folder), *other]) == 2
    assert "block_out_channels" in capsys.readouterr().err


def test_info_on_the_run_and_its_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "kind: training run" in printed and f"step: {STEPS}" in printed and "averages: 0.97" in printed
    assert cli.main(["info", str(folder / "checkpoint-3")]) == 0
    assert "kind: checkpoint of a training run\nstep: 3\n" in capsys.readouterr().out


def test_evaluate_prints_the_scores_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", str(folder / "model"), "--images-per-class", "2", "--steps", "4", "--guidance-scale", "1"]
    assert cli.main(argv) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images_per_class"] == 2 and scores["steps"] == 4 and "batch_size" not in scores
    assert all(0 <= share <= 1 for share in scores["prompt_accuracy"].values())


def test_export_under_another_name_and_dtype(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert cli.main(["export", str(folder), str(out), "--ema", "none", "--dtype", "fp16", "--variant", "fp16"]) == 0
    assert (out / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert cli.main(["export", str(folder), str(tmp_path / "other"), "--ema", "0.5"]) == 2
