"""Real processes train the very run that one trains: what is drawn, the weights, caches, stops, sharded parameters."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import multi_process as tasks
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageChops

from diffusion_unet.checkpoint import read_safetensors
from diffusion_unet.errors import InputError
from training import checkpoint, train
from training.engine import make_accelerator
from training.exporting import export
from training.metrics import load

TESTS = Path(__file__).parent
# What an image contributes: pixels (which hold crop and flip), noise of all kinds, level, caption, mask.
CONTRIBUTED = {"images", "noise", "latent_noise", "masked_noise", "sigma", "weight", "ids", "masks"}


def launch(folder: Path, world: int, *names: str) -> list[dict[str, Any]]:
    """What each of `world` processes answers. A hang is an error: they end themselves, and so does torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    result = subprocess.run(
        [*command, str(TESTS / "multi_process.py"), str(folder), *names],
        env=os.environ
        | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        timeout=2 * tasks.HANGS,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    reports = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    assert [report["world"] for report in reports] == [world] * world
    return reports


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, on_cpu: None) -> tuple[Path, dict[int, list[dict[str, Any]]]]:
    """The folder with all runs, and what each process answered, by the number of processes."""
    folder = tmp_path_factory.mktemp("processes")
    tasks.prepare(folder)
    alone = {
        "draws": tasks.draws(folder),
        "double": tasks.double(folder),
        "single": tasks.single(folder),
        "tuned": tasks.tuned(folder),
        "caches": tasks.caches(folder),
        "stopped": tasks.stopped(folder),
    }
    two = launch(folder, 2, "draws", "double", "single", "tuned", "caches", "stopped", "sharded")
    four = launch(folder, 4, "draws", "double")
    return folder, {1: [alone], 2: two, 4: four}


def newest(run: Path) -> checkpoint.Checkpoint:
    found = checkpoint.load(run)
    assert found is not None
    return found


def distance(one: Path, other: Path) -> float:
    """The largest difference between weights or averages of the newest checkpoints, which hold the same ones."""
    ours, theirs = newest(one), newest(other)
    assert ours.state["step"] == theirs.state["step"] and ours.tensors.keys() == theirs.tensors.keys()
    pairs = []
    for name, part in ours.tensors.items():
        assert {key: value.shape for key, value in part.items()} == {
            k: v.shape for k, v in theirs.tensors[name].items()
        }
        pairs += [(value, theirs.tensors[name][key]) for key, value in part.items() if name != "optimizer"]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in load(run / "metrics.jsonl") if "loss" in record]


def test_what_an_image_contributes_is_the_same_on_any_processes_and_micro_batches(done: Any) -> None:
    _, reports = done
    expected = reports[1][0]["draws"]
    assert expected["fields"] == sorted(CONTRIBUTED) and expected["buckets"] > 1
    images = tasks.DRAWN * 8
    digests = expected["seen"]["1"]
    assert len(set(digests.values())) == len(digests) == images
    for world, answers in reports.items():
        for parts in map(str, tasks.MICRO_BATCHES):
            shares = [answer["draws"]["seen"][parts] for answer in answers]
            assert [len(share) for share in shares] == [images // world] * world
            assert {index: digest for share in shares for index, digest in share.items()} == digests


@pytest.mark.parametrize("world", [2, 4])
def test_weights_after_50_steps_in_float64(done: Any, world: int) -> None:
    folder, _ = done
    weights = newest(folder / f"double-{world}").tensors["model"]
    assert {value.dtype for value in weights.values()} == {torch.float64}
    assert newest(folder / f"double-{world}").state["images_seen"] == tasks.STEPS * 8
    assert distance(folder / "double-1", folder / f"double-{world}") < 1e-9
    assert losses(folder / f"double-{world}") == pytest.approx(losses(folder / "double-1"), rel=1e-9)


def test_losses_of_50_steps_in_float32(done: Any) -> None:
    folder, _ = done
    expected = losses(folder / "single-1")
    assert len(expected) == tasks.STEPS
    assert losses(folder / "single-2") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", tasks.TUNED)
def test_adapters_and_text_encoders_are_trained_as_on_one_process(done: Any, name: str) -> None:
    folder, _ = done
    weights = newest(folder / f"{name}-2").tensors["model"]
    assert {value.dtype for value in weights.values()} == {torch.float64}
    assert any(key.startswith("text.") for key in weights) == (name != "lora")
    assert all(".lora_" in key for key in weights) == (name != "words")
    assert all(value.any() for key, value in weights.items() if ".lora_B." in key)
    assert distance(folder / f"{name}-1", folder / f"{name}-2") < 1e-9
    assert losses(folder / f"{name}-2") == pytest.approx(losses(folder / f"{name}-1"), rel=1e-9)


def test_the_run_is_stopped_together_and_goes_on_on_other_numbers_of_processes(done: Any) -> None:
    """One process to step 20, two to step 35, of which SIGTERM reaches one, and one to the end."""
    folder, reports = done
    assert reports[1][0]["stopped"] and [answer["stopped"] for answer in reports[2]] == [True, True]
    run = folder / "changing"
    assert newest(run).state["step"] == tasks.STOPS[1]
    with tasks.in_double():
        train(tasks.settings(folder, "weights", "changing"), progress=False)
    assert distance(folder / "double-1", run) < 1e-9
    assert losses(run) == pytest.approx(losses(folder / "double-1"), rel=1e-9)


def test_caches_built_together_are_those_of_one(done: Any) -> None:
    folder, reports = done

    root = folder / "caches-1/cache"
    shards = sorted(path.relative_to(root) for path in root.rglob("shard-*"))
    assert shards == sorted(
        path.relative_to(folder / "caches-2/cache") for path in (folder / "caches-2").rglob("shard-*")
    )
    assert len(shards) == reports[1][0]["caches"]
    for shard in shards:
        one, other = (read_safetensors(folder / run / "cache" / shard) for run in ("caches-1", "caches-2"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert sum(answer["caches"] for answer in reports[2]) == reports[1][0]["caches"]
    assert min(answer["caches"] for answer in reports[2]) > 1


# --- sharded parameters: FSDP2 through accelerate, over gloo ---------------------------------------------------------


@pytest.fixture(scope="module")
def whole(done: Any) -> Path:
    """The run of the sharded ones, on one process with all weights."""
    folder, _ = done
    train(tasks.settings(folder, "sharded", "whole"), preview=tasks.preview, progress=False)
    return Path(folder) / "whole"


def test_sharded_parameters_are_cut_trained_saved_whole_and_resumed(done: Any, whole: Path) -> None:
    folder, reports = done
    assert [answer["sharded"]["stopped"] for answer in reports[2]] == [True, True]
    for answer in reports[2]:
        before, after = answer["sharded"]["shares"]
        assert before == after and 0.4 < before < 0.6
    assert sum(answer["sharded"]["shares"][0] for answer in reports[2]) == pytest.approx(1)
    assert distance(whole, folder / "cut") < 1e-6
    assert losses(folder / "cut") == pytest.approx(losses(whole), rel=1e-5)


def test_previews_and_held_out_losses_of_sharded_parameters(done: Any, whole: Path) -> None:
    folder, _ = done
    pictures = sorted(path.name for path in (whole / "previews").iterdir())
    assert pictures == ["step_000003.png", "step_000006.png"]
    for name in pictures:
        with Image.open(whole / "previews" / name) as one, Image.open(folder / "cut/previews" / name) as other:
            assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
    ours, theirs = (
        [record for record in load(run / "metrics.jsonl") if "held_out_loss" in record]
        for run in (whole, folder / "cut")
    )
    assert [record["step"] for record in theirs] == [3, 6]
    for one, other in zip(ours, theirs, strict=True):
        for kind in ("held_out_loss", "training_loss"):
            assert one[kind].keys() == other[kind].keys() == {"raw", "0.9"}
            for weights in ("raw", "0.9"):
                assert other[kind][weights] == pytest.approx(one[kind][weights], rel=1e-5)


def test_a_sharded_run_is_exported_and_goes_on_with_all_weights_on_one_process(
    done: Any, whole: Path, tmp_path: Path
) -> None:
    folder, _ = done
    assert (export(folder / "cut", tmp_path / "model") / "unet/diffusion_pytorch_model.safetensors").is_file()
    for name in ("whole", "cut"):
        train(tasks.settings(folder, "sharded", name, "--train.max_train_steps=7"), progress=False)
    assert newest(whole).state["step"] == 7
    assert distance(whole, folder / "cut") < 1e-6


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (tasks.FSDP, "ACCELERATE_USE_FSDP is set.*over the GPUs.*take it out"),
        (tasks.FSDP | {"FSDP_VERSION": "1"}, "FSDP_VERSION is 1.*fsdp_version: 2"),
        (tasks.FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "take fsdp_cpu_ram_efficient_loading out"),
        (tasks.FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set train.gradient_checkpointing"),
        (tasks.FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "take fsdp_offload_params out"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED.*DDP and FSDP2 only"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG.*DDP and FSDP2 only"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION is bf16.*--train.mixed_precision=bf16"),
    ],
)
def test_what_would_be_another_run_is_refused(
    environment: dict[str, str], words: str, tmp_path: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = tasks.tiny_config(tmp_path, tmp_path / "images")
    with pytest.raises(InputError, match=words) as caught:
        make_accelerator(config)
    assert "\n" not in str(caught.value)


def test_bad_input_is_told_once_by_all_processes_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [f"--data.train_data_dir={tmp_path / 'none'}", f"--train.output_dir={tmp_path / 'run'}"]
    result = subprocess.run(
        [*command, "-m", "diffusion_unet", "train", "quickstart", *settings],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=tasks.HANGS,
    )
    assert result.returncode != 0
    assert result.stderr.count("error: data.train_data_dir") == 1 and result.stderr.count("is no folder") == 1
    assert "gloo" not in result.stderr and "RuntimeError" not in result.stderr
    assert result.stderr.count("exitcode: 2") + result.stderr.count("exitcode  : 2") >= 1
