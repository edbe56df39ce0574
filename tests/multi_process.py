"""What several processes do together, and test_processes.py does alone for comparison.

    torchrun --nproc-per-node N multi_process.py FOLDER TASK ...

FOLDER holds what `prepare` made. Each process writes its answers to FOLDER/N-RANK.json, and ends itself where it hangs.
"""

import dataclasses
import faulthandler
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from tiny_run import UNET, image_folder, tiny_config

from diffusion_unet.errors import Stopped
from diffusion_unet.model import DiffusionModel
from training import cache, loop
from training.config import Config, load_config
from training.engine import make_accelerator, own_part
from training.loop import Trainer, train
from training.network import Network

HANGS = 150  # seconds after which a process counts as hanging
STEPS = 50
DRAWN = 4  # steps of which everything drawn is compared
MICRO_BATCHES = (1, 2, 4)
SHARD_SIZE = 3  # entries, so that tiny caches have many shards
TUNED = ("lora", "words", "sdxl")
STOPS = (20, 35)  # steps after which the run on changing numbers of processes is stopped
# One level only: the time goes into the number of modules and tensors.
SMALLER = [
    "--model.unet.block_out_channels=[8]",
    "--model.unet.down_block_types=[CrossAttnDownBlock2D]",
    "--model.unet.up_block_types=[CrossAttnUpBlock2D]",
]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D,Transformer2DModel",
}


def prepare(folder: Path) -> None:
    """The data, the autoencoder and the settings of all tasks."""
    from tiny_pipelines import vae

    pictures = image_folder(folder / "images")
    vae().save_pretrained(folder / "vae")
    small = ["--train.train_batch_size=8", f"--train.max_train_steps={STEPS}", "--train.ema=[0.9, power-0.1]"]
    tiny_config(folder / "weights", pictures)
    _settle(folder / "weights", [*small, *SMALLER])
    _tune(folder, pictures)
    latent = {**UNET, "in_channels": 4, "out_channels": 4}
    tagged = _tagged(folder / "tagged")
    tiny_config(folder / "draws", tagged)
    _settle(
        folder / "draws",
        [
            f"--model.vae={folder / 'vae'}",
            *(f"--model.unet.{key}={json.dumps(value)}" for key, value in latent.items()),
            "--data.resolution=16",
            "--data.aspect_buckets=true",
            "--data.bucket_step=4",
            "--train.train_batch_size=8",
        ],
    )
    tiny_config(folder / "sharded", pictures)
    _settle(
        folder / "sharded",
        [
            *SMALLER,
            "--train.train_batch_size=5",
            "--train.max_train_steps=6",
            # Far above the rounding of gradients that are 0 but for it, which AdamW would enlarge without bounds.
            "--optimizer.adam_epsilon=1e-3",
            "--data.held_out=2",
            "--validation.validation_prompts=[a red square]",
            "--validation.num_validation_images=1",
            "--validation.validation_steps=3",
        ],
    )


def tuning_config(folder: Path, data: Path, pretrained: Path, *overrides: str) -> Config:
    """The settings, also in `folder`/config.yaml, of a run in `folder`/run on a model folder of 16 pixels."""
    config = {
        "model": {"pretrained": str(pretrained)},
        "data": {"train_data_dir": str(data), "resolution": 16, "random_flip": True, "caption_dropout": 0.2},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"output_dir": str(folder / "run"), "max_train_steps": 6, "train_batch_size": 4, "ema": ["0.9"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return load_config(folder / "config.yaml", overrides)


def _tune(folder: Path, pictures: Path) -> None:
    """Models of Stable Diffusion's kind and of SDXL's, and how they are tuned."""
    import tiny_models

    sd, sdxl = tiny_models.save_sd1(folder / "sd"), tiny_models.save_sdxl(folder / "sdxl")
    # Of kept latents, for the autoencoder is float32: its last bits follow the number of images it is given.
    every = ["--data.cache_latents=true", "--train.train_batch_size=8"]
    lora = ["--model.adapter.rank=4", "--model.adapter.kind=dora", "--optimizer.learning_rate=1e-2"]
    for name, model, more in (
        ("lora", sd, lora),
        ("words", sd, ["--model.train_text_encoder=true", "--objective.learned_weighting=true"]),
        ("sdxl", sdxl, [*lora, "--model.train_text_encoder=true"]),
    ):
        tuning_config(folder / name, pictures, model)
        _settle(folder / name, [*every, *more])


def _settle(folder: Path, overrides: list[str]) -> None:
    """Puts the overrides into the file."""
    config = load_config(folder / "config.yaml", overrides)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))


def _tagged(folder: Path) -> Path:
    """Pictures of several shapes, of one to three captions that are lists of tags."""
    folder.mkdir(parents=True)
    rows = []
    for number, size in enumerate([(20, 20), (30, 16), (16, 30), (24, 20)] * 4):
        picture = Image.effect_noise(size, 60 + number).convert("RGB")
        picture.paste((10 * number, 250 - 9 * number, 60), (number % 7, 2, number % 7 + 9, 11))
        picture.save(folder / f"{number}.png")
        captions = [f"square, number {number}, tag {k}, red, blue" for k in range(1 + number % 3)]
        rows.append(json.dumps({"file_name": f"{number}.png", "text": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def settings(folder: Path, name: str, run: str, *overrides: str) -> Config:
    """The settings of a task, with the run folder FOLDER/RUN."""
    return load_config(folder / name / "config.yaml", [f"--train.output_dir={folder / run}", *overrides])


def quiet(message: str) -> None:
    """What is done with messages."""


# --- tasks: each takes FOLDER, and does its part as one of however many processes there are -------------------------


def draws(folder: Path) -> dict[str, Any]:
    """A digest of all that each image of some steps contributes, by its index, for each number of micro-batches."""
    world = PartialState().num_processes
    tasks = ["--model.task=inpaint", "--data.shuffle_tags=true", "--objective.noise_offset=0.1"]
    config = settings(folder, "draws", f"draws-{world}", *tasks)
    batches = Trainer(config, make_accelerator(config), say=quiet).batches
    fields: set[str] = set()
    seen: dict[str, dict[str, str]] = {}
    for parts in MICRO_BATCHES:
        digests = seen.setdefault(str(parts), {})
        for step in range(DRAWN):
            whole = batches.assemble(step)
            for batch in (whole.part(number, parts) for number in range(parts)):
                tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
                fields |= tensors.keys()
                for place, index in enumerate(batch.indices):
                    content = b"".join(tensors[name][place].contiguous().numpy().tobytes() for name in sorted(tensors))
                    digests[str(index)] = hashlib.sha256(content).hexdigest()
    return {
        "seen": seen,
        "fields": sorted(fields),
        "buckets": len({batches.plan.course.at(s)[0] for s in range(DRAWN)}),
    }


def double(folder: Path) -> None:
    """A run in float64; two micro-batches where there are several processes."""
    world = PartialState().num_processes
    with in_double():
        parts = f"--train.gradient_accumulation_steps={min(world, 2)}"
        train(settings(folder, "weights", f"double-{world}", parts), progress=False)


def single(folder: Path) -> None:
    """The same in float32."""
    train(settings(folder, "weights", f"single-{PartialState().num_processes}"), progress=False)


def tuned(folder: Path) -> None:
    """Runs in float64 on pretrained models; two micro-batches where there are several processes."""
    world = PartialState().num_processes
    for name in TUNED:
        with in_double():
            parts = f"--train.gradient_accumulation_steps={min(world, 2)}"
            train(settings(folder, name, f"{name}-{world}", parts), progress=False)


def caches(folder: Path) -> int:
    """Builds the caches of latents and of text, and returns how many shards this process wrote."""
    world, written = PartialState().num_processes, []
    config = settings(
        folder,
        "draws",
        f"caches-{world}",
        f"--model.pretrained_text_encoder={folder / 'draws-1/base'}",
        "--model.text_encoder=null",
        "--model.train_text_encoder=false",
        "--data.cache_latents=true",
        "--data.cache_crops=2",
        "--data.cache_text=true",
        f"--data.cache_dir={folder / f'caches-{world}/cache'}",
    )

    def write(path: Path, *arguments: Any) -> None:
        written.append(path)
        write_safetensors(path, *arguments)

    write_safetensors = cache.write_safetensors
    small = partial(cache.build, shard_size=SHARD_SIZE)
    with mock.patch.object(cache, "build", small), mock.patch.object(cache, "write_safetensors", write):
        Trainer(config, make_accelerator(config), say=quiet)
    return len(written)


def stopped(folder: Path) -> bool:
    """Goes on with a float64 run, of which SIGTERM reaches the last process alone after some steps."""
    state = PartialState()
    step = STOPS[0] if state.num_processes == 1 else STOPS[1]
    with in_double(), signalled(step, state.num_processes - 1):
        return run_to_stop(settings(folder, "weights", "changing"))


def sharded(folder: Path) -> dict[str, Any]:
    """A run with weights cut over the processes, of which SIGTERM reaches the last one alone, and which is resumed."""
    last = PartialState().num_processes - 1
    os.environ |= FSDP
    AcceleratorState._reset_state(reset_partial_state=True)
    overrides = ["--train.gradient_accumulation_steps=3", "--train.gradient_checkpointing=true"]
    config = settings(folder, "sharded", "cut", *overrides)
    shares: list[float] = []
    with sharding_on_cpu(), shares_held(shares):
        with signalled(4, last):
            halted = run_to_stop(config)
        train(config, preview=preview, progress=False)
    return {"shares": shares, "stopped": halted}


# --- what they need -------------------------------------------------------------------------------------------------


class DoubleNetwork(Network):
    """In float64, which what is computed from then on follows."""

    def __init__(self, model: DiffusionModel, config: Config):
        super().__init__(model, config)
        self.double()


@contextmanager
def in_double() -> Iterator[None]:
    with mock.patch.object(loop, "Network", DoubleNetwork):
        yield


@contextmanager
def signalled(step: int, rank: int) -> Iterator[None]:
    """Sends SIGTERM to process `rank`, by itself, after optimizer step `step`."""
    take = Trainer.step

    def step_and_signal(self: Trainer, *arguments: Any) -> dict[str, float]:
        record = take(self, *arguments)
        if self.steps_done == step and self.accelerator.process_index == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    with mock.patch.object(Trainer, "step", step_and_signal):
        yield


def run_to_stop(config: Config) -> bool:
    """Whether the run told that it was stopped."""
    with suppress(Stopped):
        train(config, preview=preview, progress=False)
        return False
    return True


@contextmanager
def shares_held(shares: list[float]) -> Iterator[None]:
    """Notes for each run which share of the trained weights this process holds."""
    begin = Trainer.run

    def run(self: Trainer, *arguments: Any) -> None:
        assert self.sharded
        parts = [(own_part(value).numel(), value.numel()) for value in self.parameters.values()]
        shares.append(sum(own for own, _ in parts) / sum(all_ for _, all_ in parts))
        begin(self, *arguments)

    with mock.patch.object(Trainer, "run", run):
        yield


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """Accelerate with FSDP2 over gloo. It has it for GPUs only, and on the CPU passes over the plugin in silence; the
    one thing that stands in between is the kind of processes it notes."""
    make = AcceleratorState.__init__

    def init(
        self: Any, *arguments: Any, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **more: Any
    ) -> None:
        make(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


def preview(model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    """A picture of two steps for each seed of each prompt."""
    from sampling import sample

    return [picture for prompt in prompts for picture in sample(model, [prompt] * len(seeds), seeds=seeds, steps=2)]


TASKS = {task.__name__: task for task in (draws, double, single, tuned, caches, stopped, sharded)}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(HANGS, exit=True)
    torch.set_num_threads(1)
    state, place = PartialState(cpu=True), Path(sys.argv[1])
    answers: dict[str, Any] = {"world": state.num_processes}
    for name in sys.argv[2:]:
        answers[name] = TASKS[name](place)
    (place / f"{state.num_processes}-{state.process_index}.json").write_text(json.dumps(answers))
    torch.distributed.destroy_process_group()
