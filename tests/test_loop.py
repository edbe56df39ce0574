"""Training runs on a few coloured squares."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_run import assert_same, final, image_folder, metrics, tiny_config

from diffusion_unet.errors import InputError, NonFiniteError, SaveError, Stopped
from diffusion_unet.model import DiffusionModel
from training import loop, train
from training.config import load_config
from training.engine import locked, make_accelerator
from training.exporting import export
from training.loop import Trainer
from training.optimizer import rate_course


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Has `act` called when step `number` has been taken."""
    step = Trainer.step

    def acting(self: Trainer, batch: Any) -> dict[str, float]:
        record = step(self, batch)
        if self.steps_done == number:
            act()
        return record

    monkeypatch.setattr(Trainer, "step", acting)


@pytest.mark.parametrize(
    ("number", "optimizer"),
    [(signal.SIGTERM, ()), (signal.SIGINT, ("--optimizer.muon_lr=0.01",))],
    ids=["adamw", "muon"],
)
def test_stopped_and_resumed_is_bit_identical_to_unbroken(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, number: int, optimizer: tuple[str, ...]
) -> None:
    unbroken = tiny_config(tmp_path / "a", images, *optimizer)
    train(unbroken, progress=False)
    broken = tiny_config(tmp_path / "b", images, *optimizer)
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match="stopped at step 3, and saved") as caught:
        train(broken, progress=False)
    assert caught.value.exit_code == 75
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    monkeypatch.undo()
    assert final(broken).state["images_seen"] == 12
    train(broken, progress=False)
    assert_same(final(unbroken), final(broken))
    assert final(broken).state["step"] == 6 and final(broken).state["images_seen"] == 24
    one, other = ([record | {"seconds": 0} for record in metrics(config)] for config in (unbroken, broken))
    assert one == other and [record["step"] for record in one] == [1, 2, 3, 4, 5, 6]


def test_a_crash_after_a_checkpoint_repeats_the_steps_since(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = "--model.unet.dropout=0.2"
    unbroken = tiny_config(tmp_path / "a", images, dropout, checkpointing_steps=2)
    train(unbroken, progress=False)
    broken = tiny_config(tmp_path / "b", images, dropout, checkpointing_steps=2)

    def crash() -> None:
        raise RuntimeError("as if killed")

    at_step(monkeypatch, 5, crash)
    with pytest.raises(RuntimeError, match="as if killed"):
        train(broken, progress=False)
    monkeypatch.undo()
    assert final(broken).state["step"] == 4
    with open(tmp_path / "b/run/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"ste')
    train(broken, progress=False)
    assert_same(final(unbroken), final(broken))
    assert [record["step"] for record in metrics(broken)] == [1, 2, 3, 4, 5, 6]


def test_micro_batches_change_only_rounding(tmp_path: Path, images: Path) -> None:
    whole = tiny_config(tmp_path / "a", images, max_train_steps=3)
    cut = tiny_config(tmp_path / "b", images, max_train_steps=3, gradient_accumulation_steps=3)
    for config in (whole, cut):
        train(config, progress=False)
    losses = [[record["loss"] for record in metrics(config)] for config in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(final(whole), final(cut), 2e-3)


def test_it_learns_and_leaves_the_generator_alone(tmp_path: Path, images: Path) -> None:
    config = tiny_config(
        tmp_path, images, "--optimizer.learning_rate=1e-2", max_train_steps=60, train_batch_size=8, ema=[]
    )
    torch.manual_seed(123)
    before = torch.get_rng_state()
    train(config, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    losses = [record["loss"] for record in metrics(config)]
    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])
    assert set(final(config).tensors) == {"model", "optimizer"}
    text = [name for name in final(config).tensors["model"] if name.startswith("text.")]
    start = DiffusionModel.load(tmp_path / "run/base")
    assert start.text and any(
        not torch.equal(final(config).tensors["model"][name], start.text.state_dict()[name[5:]]) for name in text
    )


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, images, max_train_steps=2)
    assert train(config, progress=False) == tmp_path / "run"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    shutil.rmtree(images)
    train(config, progress=False)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "finished, 2 steps" in capsys.readouterr().err


def test_a_longer_run_goes_on(tmp_path: Path, images: Path) -> None:
    train(
        tiny_config(tmp_path, images, "--optimizer.lr_scheduler=constant_with_warmup", max_train_steps=3),
        progress=False,
    )
    longer = tiny_config(tmp_path, images, "--optimizer.lr_scheduler=constant_with_warmup", max_train_steps=6)
    train(longer, progress=False)
    whole = tiny_config(tmp_path / "b", images, "--optimizer.lr_scheduler=constant_with_warmup", max_train_steps=6)
    train(whole, progress=False)
    assert_same(final(longer), final(whole))


def test_a_change_that_is_allowed_is_recorded(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tmp_path, images, max_train_steps=2), progress=False)
    other = tiny_config(tmp_path, images, "--optimizer.learning_rate=0.5", max_train_steps=4)
    with pytest.raises(InputError, match=r"data\.resolution: 8 -> 16"):
        both = tiny_config(tmp_path, images, "--optimizer.learning_rate=0.5", "--data.resolution=16", max_train_steps=4)
        train(both, progress=False, allow_change=["optimizer.learning_rate"])
    train(other, progress=False, allow_change=["optimizer.learning_rate"])
    change = {"step": 2, "setting": "optimizer.learning_rate", "from": 1e-3, "to": 0.5}
    assert final(other).state["changes"] == [change]
    assert "optimizer.learning_rate: 0.001 -> 0.5, as allowed" in capsys.readouterr().err
    rates = [record["lr"] for record in metrics(other) if "lr" in record]
    assert all(rate <= 1e-3 for rate in rates[:2]) and all(rate > 1e-2 for rate in rates[2:])
    Image.new("RGB", (14, 10), (1, 2, 3)).save(images / "3.png")
    longer = tiny_config(tmp_path, images, "--optimizer.learning_rate=0.5", max_train_steps=5)
    train(longer, progress=False, allow_change=["data.train_data_dir"])
    assert [one["setting"] for one in final(longer).state["changes"]] == [
        "optimizer.learning_rate",
        "data.train_data_dir",
    ]
    train(longer, progress=False)  # finished, and with the change taken over


@pytest.mark.parametrize(
    "key, reason",
    [("model.unet", "another run"), ("optimizer.lerning_rate", "did you mean"), ("train.report_to", "no")],
)
def test_what_cannot_be_allowed(tmp_path: Path, images: Path, key: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        train(tiny_config(tmp_path, images), progress=False, allow_change=[key])
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_another_run(tmp_path: Path, images: Path) -> None:
    config = tiny_config(tmp_path, images, max_train_steps=2)
    train(config, progress=False)
    file = tmp_path / "run/base/tokenizer/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"run/base is not the model that the run began with"):
        train(tiny_config(tmp_path, images, max_train_steps=4), progress=False)


def test_a_resume_with_something_changed_is_refused_by_name(tmp_path: Path, images: Path) -> None:
    train(tiny_config(tmp_path, images, max_train_steps=2), progress=False)
    for override, named in (
        ("--optimizer.learning_rate=0.5", "optimizer.learning_rate: 0.001 -> 0.5"),
        ("--model.unet.layers_per_block=2", "with model.unet.layers_per_block: 1 -> 2: change it back"),
        ("--objective.weighting=edm", "objective.weighting"),
        ("--train.ema=[]", 'train.ema: ["0.9"] -> []'),
    ):
        with pytest.raises(InputError) as caught:
            train(tiny_config(tmp_path, images, override, max_train_steps=4), progress=False)
        assert named in str(caught.value) and "\n" not in str(caught.value)
    Image.new("RGB", (14, 10), (1, 2, 3)).save(images / "3.png")
    with pytest.raises(InputError, match=r"data\.train_data_dir: images or captions are not those"):
        train(tiny_config(tmp_path, images, max_train_steps=4), progress=False)
    assert final(tiny_config(tmp_path, images)).state["step"] == 2


def test_no_step_is_taken_on_what_is_not_finite(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, images, checkpointing_steps=2)
    losses = loop.image_losses

    def spoil() -> None:
        monkeypatch.setattr(loop, "image_losses", lambda *given: losses(*given) * torch.tensor([1, torch.nan, 1, 1]))

    at_step(monkeypatch, 3, spoil)
    with pytest.raises(NonFiniteError) as caught:
        train(config, progress=False)
    message = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in message
    assert "step 4: loss nan" in message and "sigma" in message
    assert message.count("metadata.jsonl, row") == 1
    assert final(config).state["step"] == 2
    monkeypatch.undo()
    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *given: clip(*given) * torch.inf)
    with pytest.raises(NonFiniteError, match=r"gradient inf.*images .*row.*row"):
        train(config, progress=False)
    assert all(tensor.isfinite().all() for part in final(config).tensors.values() for tensor in part.values())


def test_bad_samples(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "5.png").write_bytes(b"no picture")
    config = tiny_config(tmp_path, images, max_train_steps=1)
    with pytest.raises(InputError, match=r"1 of 12 samples .* more than data\.max_bad_fraction"):
        train(config, progress=False)
    assert "row 6, '5.png'" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    train(tiny_config(tmp_path, images, "--data.max_bad_fraction=0.1", max_train_steps=1), progress=False)
    listed = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "row 6, '5.png'" in listed[0]["name"] and listed[0]["reason"]


def test_long_captions_are_cut_and_counted(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = images / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a blue square", "blue " * 20))
    train(tiny_config(tmp_path, images, max_train_steps=1), progress=False)
    assert capsys.readouterr().err.count("1 captions are longer") == 1


def test_previews_show_the_averaged_weights(tmp_path: Path, images: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def preview(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        assert prompts == ["a red square", "a blue square"] and seeds == [0, 1, 2] and not model.unet.training
        seen.append({f"unet.{name}": tensor.clone() for name, tensor in model.unet.state_dict().items()})
        return [Image.new("RGB", (8, 8), "red")] * 6

    config = tiny_config(
        tmp_path,
        images,
        "--validation.validation_prompts=[a red square, a blue square]",
        "--validation.num_validation_images=3",
        "--validation.validation_steps=2",
        "--data.held_out=3",
        max_train_steps=4,
    )
    train(config, preview=preview, progress=False)
    assert sorted(path.name for path in (tmp_path / "run/previews").iterdir()) == ["step_000002.png", "step_000004.png"]
    average = final(config).tensors["ema_0.9"]
    assert all(torch.equal(average[name], tensor) for name, tensor in seen[-1].items())
    assert not all(torch.equal(final(config).tensors["model"][name], tensor) for name, tensor in seen[-1].items())
    losses = [record["held_out_loss"] for record in metrics(config) if "held_out_loss" in record]
    assert len(losses) == 2 and all(set(weights) == {"raw", "0.9"} for weights in losses)
    assert all(len(levels) == 8 for weights in losses for levels in weights.values())
    assert all(0 < loss < 10 for weights in losses for levels in weights.values() for loss in levels.values())
    assert losses[1]["raw"] != losses[1]["0.9"]
    gaps = [record["training_loss"] for record in metrics(config) if "training_loss" in record]
    assert len(gaps) == 2 and gaps[0].keys() == losses[0].keys()


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_look_that_a_stop_prevented_is_made_up_for(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    extra = ("--validation.validation_prompts=[red]", "--validation.validation_steps=2", "--data.held_out=3")

    def preview(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8))] * len(seeds)

    unbroken = tiny_config(tmp_path / "a", images, *extra, max_train_steps=4)
    train(unbroken, preview=preview, progress=False)
    broken = tiny_config(tmp_path / "b", images, *extra, max_train_steps=4)
    at_step(monkeypatch, stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(broken, preview=preview, progress=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "b/run/previews").glob("*"))) == stop_at // 2 - 1
    train(broken, preview=preview, progress=False)
    assert len(list((tmp_path / "b/run/previews").glob("*"))) == 2
    assert [record | {"seconds": 0} for record in metrics(broken)] == [r | {"seconds": 0} for r in metrics(unbroken)]
    assert_same(final(unbroken), final(broken))


def test_bfloat16_runs_and_keeps_float32_weights(tmp_path: Path, images: Path) -> None:
    AcceleratorState._reset_state(True)
    try:
        config = tiny_config(tmp_path, images, "--data.held_out=2", max_train_steps=3, mixed_precision="bf16")
        train(config, progress=False)
    finally:
        AcceleratorState._reset_state(True)
    assert all(t.dtype == torch.float32 for part in final(config).tensors.values() for t in part.values())
    exact = tiny_config(tmp_path / "exact", images, "--data.held_out=2", max_train_steps=3)
    train(exact, progress=False)
    pairs = [(a["loss"], b["loss"]) for a, b in zip(metrics(config), metrics(exact), strict=True) if "loss" in a]
    assert all(abs(low - full) < 0.05 * full for low, full in pairs) and any(low != full for low, full in pairs)


def test_checkpointed_gradients_are_the_same(tmp_path: Path, images: Path) -> None:
    plain, checkpointed = (
        tiny_config(tmp_path / str(on), images, f"--train.gradient_checkpointing={str(on).lower()}", max_train_steps=3)
        for on in (False, True)
    )
    for config in (plain, checkpointed):
        train(config, progress=False)
    one, other = final(plain), final(checkpointed)
    assert_same(replace(one, state={}), replace(other, state={}), 1e-5)


def test_pictures_of_a_model_that_is_told_nothing(tmp_path: Path, images: Path) -> None:
    def preview(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        assert prompts == [] and seeds == [0, 1, 2, 3] and model.text is None
        return [Image.new("RGB", (8, 8), "red")] * 4

    config = tiny_config(
        tmp_path,
        images,
        "--model.text_encoder=null",
        '--model.unet.down_block_types=["DownBlock2D", "DownBlock2D"]',
        '--model.unet.up_block_types=["UpBlock2D", "UpBlock2D"]',
        "--model.unet.mid_block_type=UNetMidBlock2D",
        max_train_steps=1,
    )
    train(config, preview=preview, progress=False)
    assert [path.name for path in (tmp_path / "run/previews").iterdir()] == ["step_000001.png"]


def test_one_trainer_per_run_folder(tmp_path: Path, images: Path) -> None:
    config = tiny_config(tmp_path, images, max_train_steps=1)
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process is training there"):
        train(config, progress=False)
    train(config, progress=False)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path, images: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="run folder cannot be made"):
        train(tiny_config(tmp_path, images, output_dir=str(tmp_path / "file/run")), progress=False)


def test_fine_tuning_trains_the_unet_and_leaves_the_text_encoder(tmp_path: Path, images: Path) -> None:
    train(tiny_config(tmp_path / "a", images, max_train_steps=1), progress=False)
    export(tmp_path / "a/run", tmp_path / "model")
    tiny_config(tmp_path / "b", images, max_train_steps=2)
    settings = (tmp_path / "b/config.yaml").read_text()
    begin, end = settings.index("model:"), settings.index("optimizer:")
    (tmp_path / "b/config.yaml").write_text(
        settings[:begin] + f"model: {{pretrained: {tmp_path}/model}}\n" + settings[end:]
    )
    config = load_config(tmp_path / "b/config.yaml")
    train(config, progress=False)
    assert not any(name.startswith("text.") for name in final(config).tensors["model"])
    export(tmp_path / "b/run", tmp_path / "tuned")
    old, new = DiffusionModel.load(tmp_path / "model"), DiffusionModel.load(tmp_path / "tuned")
    assert old.text and new.text and old.codec == new.codec
    assert all(torch.equal(old.text.state_dict()[name], tensor) for name, tensor in new.text.state_dict().items())
    assert any(not torch.equal(old.unet.state_dict()[name], tensor) for name, tensor in new.unet.state_dict().items())


def test_no_text_at_all(tmp_path: Path, images: Path) -> None:
    plain = (
        "--model.unet.down_block_types=[DownBlock2D, DownBlock2D]",
        "--model.unet.mid_block_type=UNetMidBlock2D",
        "--model.unet.up_block_types=[UpBlock2D, UpBlock2D]",
    )
    config = tiny_config(tmp_path, images, "--model.text_encoder=null", *plain, max_train_steps=2)
    train(config, progress=False)
    assert not any(name.startswith("text.") for name in final(config).tensors["model"])
    wrong = tiny_config(tmp_path / "b", images, *plain)
    with pytest.raises(InputError, match=r"model\.text_encoder: the U-Net has no cross-attention"):
        train(wrong, progress=False)


def test_rates_are_those_of_diffusers(tmp_path: Path, images: Path) -> None:
    from diffusers.optimization import get_scheduler

    for name in ("constant_with_warmup", "linear", "cosine", "polynomial"):
        config = tiny_config(tmp_path, images, f"--optimizer.lr_scheduler={name}", max_train_steps=10)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)
        course = rate_course(config)
        for step in range(10):
            assert 1e-3 * course(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
            optimizer.step()
            scheduler.step()


def test_the_text_encoder_has_its_own_rate(tmp_path: Path, images: Path) -> None:
    config = tiny_config(tmp_path, images, "--optimizer.text_encoder_lr=2e-4")
    trainer = Trainer(config, make_accelerator(config), say=lambda message: None)
    unet, text = trainer.optimizer.param_groups
    names = {id(parameter): name for name, parameter in trainer.parameters.items()}
    assert all(names[id(parameter)].startswith("unet.") for parameter in unet["params"])
    assert all(names[id(parameter)].startswith("text.") for parameter in text["params"])
    assert len(unet["params"]) + len(text["params"]) == len(trainer.parameters)
    for step in range(3):
        assert trainer.step(trainer.batches.assemble(step))["lr"] == unet["lr"]
        assert unet["lr"] == pytest.approx(1e-3 * trainer.course(step))
        assert text["lr"] == pytest.approx(2e-4 * trainer.course(step))
    assert trainer.course(2) == 1


def test_gradients_are_clipped_to_their_norm(tmp_path: Path, images: Path) -> None:
    gradients: list[torch.Tensor] = []
    for limit in ("null", "0.01"):
        config = tiny_config(tmp_path / limit, images, f"--optimizer.max_grad_norm={limit}")
        trainer = Trainer(config, make_accelerator(config), say=lambda message: None)
        trainer.prepared.zero_grad = lambda: None
        norm = trainer.step(trainer.batches.assemble(0))["grad_norm"]
        grads = [parameter.grad.flatten() for parameter in trainer.parameters.values() if parameter.grad is not None]
        gradients.append(torch.cat(grads))
    assert norm == pytest.approx(float(gradients[0].norm()), rel=1e-4) and norm > 0.01
    assert float(gradients[1].norm()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(gradients[1], gradients[0] * (0.01 / norm), rtol=1e-3, atol=1e-7)


def test_dropped_captions_are_the_empty_one(tmp_path: Path, images: Path) -> None:
    config = tiny_config(tmp_path, images, "--data.caption_dropout=0.5", train_batch_size=48)
    trainer = Trainer(config, make_accelerator(config), say=lambda message: None)
    batch = trainer.batches.assemble(0)
    assert trainer.model.text and batch.ids is not None
    empty = trainer.model.text.tokenize([""])[0][0]
    drop = trainer.batches.plan.draw(batch.indices).drop < 0.5
    assert 12 < int(drop.sum()) < 36
    assert torch.equal((batch.ids == empty).all(dim=1), drop)


def test_the_bar_shows_loss_speed_and_time_left(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(tmp_path, images, max_train_steps=30), progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"\d+/120 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ images/s, loss \d\.\d{4}\]", shown), shown
