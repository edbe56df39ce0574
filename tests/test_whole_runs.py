"""Whole runs: broken in two they end where unbroken ones do, whatever has a state of its own; half precision with a
scaled loss, TF32, a compiled network, trackers."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import multi_process as tasks
import pytest
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL.Image import Image
from tiny_run import assert_same, final, image_folder, metrics, tiny_config

from diffusion_unet.errors import InputError, NonFiniteError, Stopped
from diffusion_unet.model import DiffusionModel
from sampling import sample
from training import checkpoint, engine, evaluate, export, loop, train
from training.config import Config
from training.loop import Trainer
from training.metrics import flatten

begun = itertools.count()
STOP = 3  # steps after which a run is stopped, in the middle of everything
LOOKS = "--validation.validation_steps=4"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], Path]], Path]:
    """The folder that a function makes, which is made once."""
    known: dict[Any, Path] = {}

    def get(make: Callable[[Path], Path]) -> Path:
        if make not in known:
            known[make] = make(tmp_path_factory.mktemp("made") / "folder")
        return known[make]

    return get


def preview(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image]:
    """As the command line has it."""
    return sample(model, prompts, seeds=seeds, steps=2)


def run(config: Config) -> None:
    torch.manual_seed(next(begun))  # torch's own generator is no part of a run
    train(config, preview=preview, progress=False)


def run_in_two(config: Config, stop: int = STOP) -> None:
    """Trains to step `stop`, where SIGTERM arrives, and then to the end."""
    with tasks.signalled(stop, 0), pytest.raises(Stopped):
        run(config)
    assert final(config).state["step"] == stop
    run(config)


def written(config: Config) -> list[dict[str, Any]]:
    """metrics.jsonl but for the time."""
    return [record | {"seconds": None} for record in metrics(config)]


def state(found: checkpoint.Checkpoint) -> dict[str, Any]:
    """What a checkpoint says besides tensors, but for the time and the settings."""
    return {name: value for name, value in found.state.items() if name not in ("seconds", "config")}


# --- a run that was stopped and one that was not -------------------------------------------------------------------


def pixels(folder: Path, made: Any) -> Config:
    """A new model and its text encoder; buckets that carry over; tags; everything that draws; held-out images; several
    averages and the optimizer's own; uneven micro-batches."""
    pytest.importorskip("schedulefree")
    return tiny_config(
        folder,
        made(tasks._tagged),
        "--data.aspect_buckets=true",
        "--data.bucket_step=2",
        "--data.shuffle_tags=true",
        "--data.held_out=2",
        "--model.unet.dropout=0.2",
        "--objective.learned_weighting=true",
        "--objective.loss=huber",
        "--objective.noise_offset=0.1",
        "--objective.weighting=min_snr",
        "--optimizer.optimizer=schedulefree:AdamWScheduleFree",
        "--optimizer.optimizer_args={warmup_steps: 2}",
        "--validation.validation_prompts=[red, blue]",
        "--validation.num_validation_images=2",
        LOOKS,
        max_train_steps=8,
        train_batch_size=5,
        gradient_accumulation_steps=2,
        ema=["0.9", "power-0.1"],
    )


def kept(folder: Path, made: Any) -> Config:
    """Latents of several crops and both flips and texts, all from caches; buckets; Prodigy."""
    pytest.importorskip("prodigyopt")
    return tasks.tuning_config(
        folder,
        made(tiny_models.captioned_images),
        made(tiny_models.save_sd1),
        "--data.cache_latents=true",
        "--data.cache_crops=3",
        "--data.cache_text=true",
        "--data.aspect_buckets=true",
        "--data.bucket_step=4",
        "--data.held_out=2",
        "--objective.weighting=soft_min_snr",
        "--optimizer.optimizer=prodigyopt:Prodigy",
        "--optimizer.learning_rate=1",
        "--optimizer.optimizer_args={d0: 1e-3}",
        "--train.gradient_accumulation_steps=2",
        "--train.ema=[power-0.1, power-0.2]",
        LOOKS,
    )


def lora(folder: Path, made: Any) -> Config:
    """An adapter of the U-Net and of the text encoder, with dropout; prior preservation; learned weights."""
    pytest.importorskip("peft")
    return tasks.tuning_config(
        folder,
        made(tiny_models.plain_images),
        made(tiny_models.save_sd1),
        "--model.adapter.rank=4",
        "--model.adapter.dropout=0.2",
        "--model.train_text_encoder=true",
        "--data.instance_prompt=a sks boot",
        f"--data.class_data_dir={made(class_images)}",
        "--data.class_prompt=a boot",
        "--data.num_class_images=4",
        "--objective.learned_weighting=true",
        "--optimizer.text_encoder_lr=1e-4",
        "--validation.validation_prompts=[a sks boot]",
        LOOKS,
    )


def class_images(folder: Path) -> Path:
    return tiny_models.plain_images(folder, 4)


def dora(folder: Path, made: Any) -> Config:
    """Of SDXL's kind: two text encoders, sizes and crops; latents from a cache, tags in orders drawn anew."""
    pytest.importorskip("peft")
    return tasks.tuning_config(
        folder,
        made(tiny_models.tagged_images),
        made(tiny_models.save_sdxl),
        "--model.adapter.rank=4",
        "--model.adapter.kind=dora",
        "--data.cache_latents=true",
        "--data.cache_crops=2",
        "--data.shuffle_tags=true",
        "--train.gradient_accumulation_steps=3",
        "--train.ema=[0.9, constant-0.5]",
        LOOKS,
    )


def word(folder: Path, made: Any) -> Config:
    """Textual inversion."""
    return tasks.tuning_config(
        folder,
        made(tiny_models.plain_images),
        made(tiny_models.save_sd1),
        "--model.textual_inversion.placeholder_token=<toy>",
        "--model.textual_inversion.initializer_token=a",
        "--model.textual_inversion.num_vectors=2",
        "--data.instance_prompt=a <toy>",
        "--validation.validation_prompts=[a <toy>]",
        LOOKS,
    )


def inpaint(folder: Path, made: Any) -> Config:
    """The whole U-Net with more inputs, and the text encoder of a model that predicts v; rates of groups; Muon."""
    return tasks.tuning_config(
        folder,
        made(tiny_models.captioned_images),
        made(tiny_models.save_sd2),
        "--model.task=inpaint",
        "--model.train_text_encoder=true",
        "--data.held_out=1",
        "--optimizer.muon_lr=1e-2",
        "--optimizer.text_encoder_lr=1e-4",
        '--optimizer.group_lr={"conv_in": 1e-2}',
        "--optimizer.lr_scheduler=polynomial",
        "--train.ema=[]",
        LOOKS,
    )


@pytest.mark.filterwarnings("ignore:.*:UserWarning:prodigyopt")
@pytest.mark.parametrize("make", [pixels, kept, lora, dora, word, inpaint])
def test_a_run_in_two_parts_is_the_unbroken_one_bit_for_bit(
    make: Callable[[Path, Any], Config], made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LEVELS_EVERY", 4)  # so that some are counted before the stop and some after it
    monkeypatch.setattr(evaluate, "LEVELS", 2)  # each takes its time
    unbroken, broken = make(tmp_path / "a", made), make(tmp_path / "b", made)
    run(unbroken)
    run_in_two(broken)
    assert_same(final(unbroken), final(broken))
    assert state(final(unbroken)) == state(final(broken))
    assert written(unbroken) == written(broken)
    assert {"model", "optimizer", *(f"ema_{name}" for name in unbroken.train.ema)} <= final(broken).tensors.keys()
    pictures = [sorted((Path(c.train.output_dir) / "previews").glob("*.png")) for c in (unbroken, broken)]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*pictures, strict=True))


def test_the_buckets_of_these_runs_carry_over(made: Any, tmp_path: Path) -> None:
    """After the stop a step takes what was left of one epoch and the beginning of the next."""
    config = pixels(tmp_path, made)
    plan = Trainer(config, engine.make_accelerator(config), say=tasks.quiet).batches.plan
    size, last = config.train.train_batch_size, config.train.max_train_steps
    mixed, buckets = set(), set()
    for step in range(last):
        bucket, batch = plan.course.at(step)
        members = len(plan.members[bucket])
        buckets.add(bucket)
        if batch * size // members != ((batch + 1) * size - 1) // members:
            mixed.add(step)
    assert len(buckets) > 1 and max(mixed) >= STOP


# --- half precision with a scaled loss ------------------------------------------------------------------------------


@pytest.fixture
def precision() -> Iterator[None]:
    """Accelerate keeps the first precision that it was asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Scaling(Accelerator):
    """With the scaler that accelerate makes for half precision on every device but the CPU."""

    first = 2.0**16

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.first, growth_interval=2)


@pytest.fixture
def scaling(precision: None, monkeypatch: pytest.MonkeyPatch) -> type[Scaling]:
    monkeypatch.setattr(engine, "Accelerator", Scaling)
    return Scaling


def half(folder: Path, images: Path, *overrides: str, **train: Any) -> Config:
    return tiny_config(folder, images, *overrides, mixed_precision="fp16", **train)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


def test_half_precision_without_a_scaler_is_refused(tmp_path: Path, images: Path, precision: None) -> None:
    """On the CPU accelerate takes the setting, and then does nothing of it."""
    with pytest.raises(InputError, match=r"^train\.mixed_precision: fp16 is not to be had here: .*bf16") as caught:
        run(half(tmp_path, images))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_half_precision_is_near_single(
    tmp_path: Path, images: Path, scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = half(tmp_path / "low", images)
    run(low)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(engine, "Accelerator", Accelerator)
    full = tiny_config(tmp_path / "full", images)
    run(full)
    assert {tensor.dtype for part in final(low).tensors.values() for tensor in part.values()} == {torch.float32}
    for one, other in zip(metrics(low), metrics(full), strict=True):
        for name in ("loss", "grad_norm"):  # of gradients that are unscaled, and clipped as such
            assert one[name] == pytest.approx(other[name], rel=0.03) and one[name] != other[name]


def test_a_step_of_an_infinite_gradient_is_left_out(tmp_path: Path, images: Path, scaling: Any) -> None:
    scaling.first = 2.0**40
    config = half(tmp_path, images)
    trainer = Trainer(config, engine.make_accelerator(config), say=tasks.quiet)
    before = {name: tensor.clone() for name, tensor in trainer.parameters.items()}
    scales, skipped = [2.0**40], []
    for step in range(40):
        skipped.append(not math.isfinite(trainer.step(trainer.batches.assemble(step))["grad_norm"]))
        scales.append(trainer.accelerator.scaler.get_scale())
        if not skipped[-1]:
            break
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.parameters.items())
        assert all(torch.equal(average[name], before[name]) for average in [trainer.emas[0].state()] for name in before)
    assert len(skipped) > 2 and not skipped[-1] and trainer.steps_done == len(skipped)
    assert scales == [2.0 ** (40 - min(n, len(skipped) - 1)) for n in range(len(skipped) + 1)]
    assert not all(torch.equal(tensor, before[name]) for name, tensor in trainer.parameters.items())
    assert {float(kept["step"]) for kept in trainer.optimizer.state.values()} == {1.0}


def test_a_scale_below_one_ends_the_run(
    tmp_path: Path, images: Path, scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling.first = 4.0
    config = half(tmp_path, images)
    trainer = Trainer(config, engine.make_accelerator(config), say=tasks.quiet)
    before = {name: tensor.clone() for name, tensor in trainer.parameters.items()}
    trainer.parameters["unet.conv_out.bias"].register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match=r"^step 3: loss [\d.]+, gradient inf, at sigma .*images .*row") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.parameters.items())
    assert [record["step"] for record in metrics(config)] == [1, 2]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_scale_goes_on_where_it_was(tmp_path: Path, images: Path, scaling: Any) -> None:
    scaling.first = 2.0**10
    unbroken, broken = (half(tmp_path / name, images) for name in ("a", "b"))
    run(unbroken)
    run_in_two(broken)
    assert_same(final(unbroken), final(broken))
    assert written(unbroken) == written(broken)
    assert state(final(unbroken))["scaler"]["scale"] == 2.0**13  # doubled after every second step
    assert state(final(unbroken)) == state(final(broken))


# --- what torch is told ---------------------------------------------------------------------------------------------


@pytest.fixture
def exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_where_it_is_asked_for(tmp_path: Path, images: Path, exact: None, allowed: bool) -> None:
    run(tiny_config(tmp_path, images, max_train_steps=1, allow_tf32=allowed))
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert torch.backends.cudnn.allow_tf32 == allowed


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch hides it
def test_a_compiled_network_is_trained_as_the_other(
    backend: str, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn with, measured, stopped and resumed. The one backend is what users have, the other only traces."""
    traced: list[Any] = []
    compile_ = torch.nn.Module.compile

    def noted(module: torch.nn.Module) -> None:
        traced.append(module)
        compile_(module, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", noted)
    overrides = [*tasks.SMALLER, "--validation.validation_prompts=[a red square]", LOOKS]
    overrides += ["--data.held_out=2"] if backend == "inductor" else []  # which is traced anew
    eager, compiled = (tiny_config(tmp_path / str(on), images, *overrides, compile=on) for on in (False, True))
    run(eager)
    assert not traced
    run_in_two(compiled)
    assert [type(module).__name__ for module in traced] == ["UNet", "UNet"]
    assert_same(final(eager), final(compiled), 1e-4)
    assert not any("_orig_mod" in name for part in final(compiled).tensors.values() for name in part)
    for one, other in zip(metrics(eager), metrics(compiled), strict=True):
        for name in ("loss", "held_out_loss"):
            told = [flatten({name: record.get(name)}) for record in (one, other)]
            assert told[0] == pytest.approx(told[1], rel=1e-4)
    assert len(list((tmp_path / "True/run/previews").iterdir())) == 2
    model = DiffusionModel.load(export(tmp_path / "True/run", tmp_path / "model"))
    assert len(preview(model, ["a red square"], [0])) == 1


# --- trackers -------------------------------------------------------------------------------------------------------


def events(config: Config, tag: str) -> list[tuple[int, float]]:
    """What tensorboard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(config.train.output_dir)
    found = EventAccumulator(str(folder / "logs" / folder.name))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def next_second() -> None:
    """Tensorboard orders the files of a run by the second in which each was begun."""
    time.sleep(1 - time.time() % 1)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tensorboard")
@pytest.mark.parametrize("saved", [2, 100])
def test_tensorboard_holds_every_step_once(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    """Of a run that died at step 4, after the checkpoint of step 2 or before any, and was then stopped at step 5."""
    pytest.importorskip("tensorboard")
    config = tiny_config(tmp_path, images, report_to=["tensorboard"], checkpointing_steps=saved)
    take = Trainer.step

    def dies(self: Trainer, *arguments: Any) -> dict[str, float]:
        if self.steps_done == 4:
            raise RuntimeError("as if killed")
        return take(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="as if killed"):
        patch.setattr(Trainer, "step", dies)
        run(config)
    next_second()
    with tasks.signalled(5, 0), pytest.raises(Stopped):
        run(config)
    next_second()
    run(config)
    for name in ("loss", "lr"):
        told = events(config, name)
        assert [step for step, _ in told] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in told] == pytest.approx([record[name] for record in metrics(config)], rel=1e-6)
    assert [record["step"] for record in metrics(config)] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_is_not_installed_is_one_line(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(InputError, match=r"^train\.report_to: wandb is not installed: pip install wandb") as caught:
        run(tiny_config(tmp_path, images, report_to=["tensorboard", "wandb"]))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
