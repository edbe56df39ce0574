"""What a run refuses, and what it keeps when something fails."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_run import assert_same, final, image_folder, metrics, tiny_config

from diffusion_unet.errors import InputError, NonFiniteError
from diffusion_unet.model import DiffusionModel
from training import looking, train
from training.config import ModelConfig
from training.exporting import export
from training.loop import Trainer
from training.preflight import check


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), InputError("no picture")])
def test_a_look_that_fails_loses_no_step(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    extra = ("--validation.validation_prompts=[red]", "--validation.validation_steps=2", "--data.held_out=3")

    def preview(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8))] * len(seeds)

    def fails(*given: Any) -> None:
        raise failure

    unbroken = tiny_config(tmp_path / "a", images, *extra, max_train_steps=3)
    train(unbroken, preview=preview, progress=False)
    broken = tiny_config(tmp_path / "b", images, *extra, max_train_steps=3)
    monkeypatch.setattr(looking, "save_png", fails)
    with pytest.raises(type(failure)) as caught:
        train(broken, preview=preview, progress=False)
    assert caught.value is failure
    monkeypatch.undo()
    assert final(broken).state["step"] == 2 and final(broken).state["look_due"]
    train(broken, preview=preview, progress=False)
    assert_same(final(unbroken), final(broken))
    assert [record | {"seconds": 0} for record in metrics(broken)] == [r | {"seconds": 0} for r in metrics(unbroken)]
    assert len(list((tmp_path / "b/run/previews").glob("*"))) == 2


@pytest.mark.parametrize(
    ("override", "part"),
    [
        (
            "--validation.validation_prompts=[red red red red red red red red]",
            "validation.validation_prompts: the prompt",
        ),
        ("--model.unet.sample_size=16", "model.unet.sample_size: 16 is not data.resolution (8)"),
        ("--model.unet.num_class_embeds=3", "is told classes, not captions"),
        ("--model.unet.class_embed_type=timestep", "training has nothing to give to a U-Net with class_embed_type"),
        ("--model.unet.time_cond_proj_dim=4", "time_cond_proj_dim"),
        ("--model.unet.layer_per_block=2", "model.unet: U-Net configuration: layer_per_block is not a field"),
        ("--optimizer.optimizer=no.module:Here", "optimizer.optimizer: there is no module no"),
        ("--objective.noise_distribution=math:none", "objective.noise_distribution: math has no none"),
        ("--train.report_to=[nothing]", "train.report_to: nothing is no tracker"),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_begins(
    tmp_path: Path, images: Path, override: str, part: str
) -> None:
    with pytest.raises(InputError) as caught:
        train(tiny_config(tmp_path, images, override), progress=False)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_fewer_steps_than_were_taken_are_refused(tmp_path: Path, images: Path) -> None:
    train(tiny_config(tmp_path, images, max_train_steps=3), progress=False)
    with pytest.raises(InputError, match=r"cannot go on with train\.max_train_steps: 2, for it has taken more"):
        train(tiny_config(tmp_path, images, max_train_steps=2), progress=False)


def test_spoilt_weights_are_not_saved(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def spoils(self: Trainer, batch: Any) -> dict[str, float]:
        record = step(self, batch)
        with torch.no_grad():
            self.parameters["unet.conv_out.bias"][1] = torch.inf
        return record

    monkeypatch.setattr(Trainer, "step", spoils)
    config = tiny_config(tmp_path, images, max_train_steps=1)
    with pytest.raises(NonFiniteError, match=r"the weights unet\.conv_out\.bias are infinite"):
        train(config, progress=False)
    monkeypatch.undo()
    config = tiny_config(tmp_path, images, "--optimizer.learning_rate=1e30", max_train_steps=2)
    with pytest.raises(NonFiniteError, match="step 2: the weights"):
        train(config, progress=False)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_another_pretrained_model_is_refused(tmp_path: Path, images: Path) -> None:
    train(tiny_config(tmp_path / "a", images, max_train_steps=3), progress=False)
    export(tmp_path / "a/run", tmp_path / "model")
    tuned = [tiny_config(tmp_path / "b", images, max_train_steps=steps) for steps in (1, 2)]
    tuned = [dataclasses.replace(config, model=ModelConfig(pretrained=str(tmp_path / "model"))) for config in tuned]
    train(tuned[0], progress=False)
    export(tmp_path / "a/run", tmp_path / "model", ema="none")
    with pytest.raises(InputError, match=r"model\.pretrained: .* is not the model that the run began with"):
        train(tuned[1], progress=False)
    with pytest.raises(InputError, match=r"is not the model that the run began with"):
        export(tmp_path / "b/run", tmp_path / "tuned")


def test_a_pretrained_model_of_unknown_size_draws_no_previews(tmp_path: Path, images: Path) -> None:
    """Told before the first step, not at the first preview."""
    train(tiny_config(tmp_path / "a", images, max_train_steps=1), progress=False)
    export(tmp_path / "a/run", tmp_path / "model")
    path = tmp_path / "model/unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    tuned = tiny_config(tmp_path / "b", images, max_train_steps=1)
    tuned = dataclasses.replace(tuned, model=ModelConfig(pretrained=str(tmp_path / "model")))
    prompts = dataclasses.replace(tuned.validation, validation_prompts=("red",))
    told = r"model\.pretrained: .* no sample_size.* take validation\.validation_prompts out"
    with pytest.raises(InputError, match=told):
        train(dataclasses.replace(tuned, validation=prompts), progress=False)
    report = check(dataclasses.replace(tuned, validation=prompts), progress=False)
    assert report.would_fail and re.search(told, report.would_fail)
    train(tuned, progress=False)


def test_accumulation_is_set_in_one_place(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(InputError, match=r"set train\.gradient_accumulation_steps"):
        train(tiny_config(tmp_path, images), progress=False)
