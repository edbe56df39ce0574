"""What `check` finds before a run, against the run itself."""

import dataclasses
import io
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pipelines import vae
from tiny_run import UNET, image_folder, tiny_config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_unet.checkpoint import read_safetensors
from diffusion_unet.codec import LatentCodec
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from training import footprint, preflight, sources, train
from training.config import Config
from training.engine import make_accelerator
from training.loop import Trainer
from training.preflight import check
from training.report import Report
from training.start import start


@pytest.fixture(autouse=True)
def few_measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass without values takes most of the time, and is looked at where it is the point."""
    if "memory" not in request.node.name:
        monkeypatch.setattr(footprint, "_activations", lambda *given: 1)


def look(config: Config) -> Report:
    return check(config, progress=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


def add_row(folder: Path, **values: Any) -> None:
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def encoded(kind: str, size: tuple[int, int] = (14, 10), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 400 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def faulty_folder(folder: Path) -> Path:
    """12 good samples, then one for each fault, and one with two."""
    image_folder(folder)
    frames = [Image.new("RGB", (14, 10), colour) for colour in ("red", "blue")]
    files = {
        "truncated.jpg": encoded("JPEG", (60, 60))[:-900],
        "garbage.png": b"no picture",
        "animated.gif": encoded("GIF", save_all=True, append_images=frames),
        "small.png": encoded("PNG", (14, 5)),
        "bomb.png": bomb(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rows: list[dict[str, Any]] = [{"file_name": name, "text": "a square"} for name in files]
    rows += [
        {"file_name": "../outside.png", "text": "a square"},
        {"file_name": "missing.png", "text": "a square"},
        {"file_name": "1.png"},
        {"file_name": "2.png", "text": " "},
        {"file_name": "truncated.jpg", "text": []},
    ]
    with open(folder / "metadata.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    return folder


def test_all_faults_are_told_at_once_with_file_and_row(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, faulty_folder(tmp_path / "images"), "--data.min_size=8")
    report = look(config)
    samples = [fault for fault in report.faults if not fault.stops]
    kinds = {
        "truncated": [13, 22],
        "undecodable": [14],
        "animated": [15],
        "too small": [16],
        "too many pixels": [17],
        "outside the folder": [18],
        "no image": [19],
        "no caption": [20],
        "empty caption": [21, 22],
        "no row": [23],
    }
    found = {kind: [fault.name for fault in samples if fault.kind == kind] for kind in {f.kind for f in samples}}
    assert found.keys() == kinds.keys()
    for kind, rows in kinds.items():
        assert len(found[kind]) == len(rows), kind
        for name, row in zip(found[kind], rows, strict=True):
            assert f"metadata.jsonl, row {row}" in name
    assert report.figures["images"] == {"found": 23, "usable": 12, "cannot_be_used": 11, "held_out": 0} | {
        "trained_on": 12
    }
    with pytest.raises(InputError) as caught:
        train(config, progress=False)
    assert [str(fault) for fault in report.faults if fault.stops] == [str(caught.value)]
    assert report.would_fail == f"training would fail: {caught.value}"


def test_images_that_metadata_does_not_list(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        (images / f"extra{number}.png").write_bytes(encoded("PNG"))
    first = ", ".join(str(images / f"extra{number}.png") for number in range(3))
    line = f"5 images are not listed in the metadata, and are not used: {first}, and 2 more"
    config = tiny_config(tmp_path, images, max_train_steps=1)
    report = look(config)
    assert line in report.notes and report.would_fail is None
    train(config, progress=False)
    assert capsys.readouterr().err.splitlines().count(line) == 1
    of_class = ("--data.class_data_dir=fashion-mnist", "--data.class_prompt=clothes", "--data.num_class_images=1")
    assert any(line in note for note in look(tiny_config(tmp_path / "prior", images, *of_class)).notes)


def test_bad_samples_that_the_settings_bear_do_not_stop_a_run(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        faulty_folder(tmp_path / "images"),
        "--data.max_bad_fraction=1",
        "--data.min_size=8",
        max_train_steps=1,
    )
    report = look(config)
    assert len(report.faults) == 12 and report.would_fail is None
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["index.jsonl"]
    train(config, progress=False)


def test_train_decodes_nothing_to_look_at_it_again(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened = tiny_config(tmp_path, images), []
    real = sources.open_array
    monkeypatch.setattr(sources, "open_array", lambda *given, **named: opened.append(given) or real(*given, **named))
    assert look(config).would_fail is None
    assert len(opened) >= 12
    opened.clear()
    start(config, make_accelerator(config), print)
    assert not opened


def test_equal_pixels_are_found_and_only_those(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    first = Image.effect_noise((14, 10), 60).convert("RGB")
    pictures = {
        "a": (first, "one"),
        "b": (first, "one"),
        "c": (first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((14, 10)), "one"),  # of the same moments
        "d": (Image.new("RGB", (14, 10), "red"), "red"),
        "e": (Image.new("RGB", (14, 10), "red"), "a red one"),
        "f": (Image.new("RGB", (14, 10), "blue"), "red"),
    }
    for name, (picture, caption) in pictures.items():
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    found = look(tiny_config(tmp_path, folder)).figures["duplicates"]
    assert [[Path(name).stem for name in group] for group in found["groups"]] == [["a", "b"], ["d", "e"]]
    assert (found["superfluous"], found["with_other_captions"]) == (2, 1)


def test_buckets_are_filled_as_counted_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    sizes = [(16, 16)] * 5 + [(64, 16)] * 3 + [(12, 12)]
    for number, size in enumerate(sizes):
        Image.effect_noise(size, 30).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("noise")
    buckets = ("--data.aspect_buckets=true", "--data.resolution=16", "--data.bucket_step=8", "--data.max_aspect=4")
    report = look(tiny_config(tmp_path, folder, *buckets))
    assert report.figures["buckets"] == [
        {"size": [32, 8], "images": 3, "batches": 0.75},
        {"size": [16, 16], "images": 6, "batches": 1.5},
        {"size": [8, 32], "images": 0, "batches": 0.0},
    ]
    assert any(note.startswith("1 buckets hold fewer images than a step takes (4)") for note in report.notes)
    assert report.figures["enlarged"] == {"images": 1, "share": 1 / 9}
    assert any("8.png" in note and "enlarged" in note for note in report.notes)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--optimizer.muon_lr=0.01", "--objective.learned_weighting=true"),
        ("--optimizer.optimizer=schedulefree:AdamWScheduleFree", "--train.ema=[]"),
    ],
)
def test_parameters_and_checkpoints_are_as_large_as_the_run_makes_them(
    tmp_path: Path, images: Path, overrides: tuple[str, ...]
) -> None:
    config = tiny_config(tmp_path, images, *overrides, max_train_steps=1)
    figures = look(config).figures
    train(config, progress=False)
    base = DiffusionModel.load(tmp_path / "run/base")
    assert base.text is not None
    weighting = 129 if config.objective.learned_weighting else 0
    count = sum(p.numel() for part in (base.unet, base.text) for p in part.parameters()) + weighting
    assert figures["parameters"] == {"all": count, "trained": count}
    files = {path.stem: read_safetensors(path) for path in (tmp_path / "run/checkpoint-1").glob("*.safetensors")}
    written = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert figures["checkpoint"] == written + 2**20
    assert figures["memory"]["optimizer"] == sum(tensor.nbytes for tensor in files["optimizer"].values())
    assert figures["disk"]["needed"]["checkpoints"] == figures["checkpoint"]  # one is all that the run writes


class Live(TorchDispatchMode):
    """The most memory of tensors made within it that were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_about_what_a_step_takes(tmp_path: Path, images: Path, checkpointing: bool) -> None:
    config = tiny_config(tmp_path, images, "--data.resolution=32", train_batch_size=6, gradient_accumulation_steps=2)
    config = _with(config, gradient_checkpointing=checkpointing)
    memory = look(config).figures["memory"]
    assert memory["images_at_a_time"] == 3
    trainer = Trainer(config, make_accelerator(config))
    batch = trainer.batches.assemble(0)
    with Live() as live:
        trainer.step(batch)
    expected = memory["activations"] + memory["gradients"] + memory["optimizer"]
    assert 0.8 * live.peak < expected < 1.3 * live.peak, (live.peak, memory)


def _with(config: Config, **train: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def test_a_class_that_looks_at_values_has_no_known_memory(tmp_path: Path, images: Path) -> None:
    report = look(tiny_config(tmp_path, images, "--optimizer.optimizer=torch.optim:Adafactor"))
    assert report.figures["memory"]["optimizer"] is None and report.would_fail is None
    assert "and the optimizer" in report.as_text()


def test_captions_and_prompts_that_are_too_long(tmp_path: Path, images: Path) -> None:
    long = "red " * 20
    add_row(images, file_name="0.png", text=[long, "red"])
    report = look(tiny_config(tmp_path, images, f"--validation.validation_prompts=[red, {long}, blue, {long}green]"))
    captions = report.figures["captions"]
    assert (captions["too_long"], captions["longest"], captions["limit"]) == (1, 22, 8)
    assert (
        captions["share"] == 1 / captions["different"] == 1 / 8
    )  # two colours in two wordings, two in one, and these two
    assert "row 13" in captions["long"][0]["name"]
    assert [fault.reason.startswith("validation.validation_prompts") for fault in report.faults] == [True, True]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("--data.held_out=12",), "data.held_out: 12 of 12 usable images leave none"),
        (("--optimizer.group_lr={nothing: 0.1}",), "optimizer.group_lr"),
        (("--optimizer.optimizer=torch.optim:None",), "optimizer.optimizer"),
        (("--train.report_to=[nobody]",), "train.report_to: nobody is no tracker"),
        (("--objective.noise_distribution=nowhere:at_all",), "objective.noise_distribution"),
        (("--data.cache_latents=true",), "data.cache_latents: this model works on pixels"),
        (("--model.unet.cross_attention_dim=24",), "the U-Net takes a context of width 24"),
        (("--model.unet.time_cond_proj_dim=4",), "time_cond_proj_dim"),
        (("--model.vae=nowhere",), "nowhere"),
        (("--data.train_data_dir=nowhere",), "data.train_data_dir: nowhere is no folder"),
    ],
)
def test_what_train_refuses_is_found_in_the_same_words(
    tmp_path: Path, images: Path, overrides: tuple[str, ...], part: str
) -> None:
    config = tiny_config(tmp_path, images, *overrides)
    report = look(config)
    assert report.would_fail and part in report.would_fail and "\n" not in report.would_fail
    with pytest.raises(InputError) as caught:
        train(config, progress=False)
    assert any(fault.reason in str(caught.value) for fault in report.faults)


def test_several_faults_of_one_run(tmp_path: Path, images: Path) -> None:
    config = tiny_config(
        tmp_path, "nowhere", "--model.vae=not-there", "--train.report_to=[nobody]", "--model.pretrained_text_encoder=no"
    )
    report = look(config)
    text = " ".join(fault.reason for fault in report.faults)
    assert all(part in text for part in ("nobody", "not-there", "nowhere", "no/tokenizer")), text
    assert report.would_fail and "4 reasons" in report.would_fail


def test_classes_of_the_network_and_of_the_data(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((14, 10), 10 + number).save(tmp_path / "images" / name / f"{number}.png")
    unet = {key: value for key, value in UNET.items() if key != "cross_attention_dim"} | {
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }
    common = (f"--model.unet={json.dumps(unet)}", "--model.text_encoder=null")
    right = look(tiny_config(tmp_path, tmp_path / "images", *common, "--model.unet.num_class_embeds=3"))
    assert right.would_fail is None and right.figures["classes"] == {"red": 3, "blue": 3}
    wrong = look(tiny_config(tmp_path, tmp_path / "images", *common, "--model.unet.num_class_embeds=5"))
    assert wrong.would_fail and "num_class_embeds: 5, and the data has 2 classes: give 3" in wrong.would_fail


def test_a_word_that_no_caption_holds(tmp_path: Path, images: Path) -> None:
    train(tiny_config(tmp_path, images, max_train_steps=1), progress=False)
    settings = {"placeholder_token": "<toy>", "initializer_token": "red", "num_vectors": 2}
    words = (
        f"--model={json.dumps({'pretrained': str(tmp_path / 'run/base'), 'textual_inversion': settings})}",
        f"--train.output_dir={tmp_path / 'other'}",
    )
    report = look(tiny_config(tmp_path, images, *words))
    assert report.would_fail and "placeholder_token: '<toy>' is in no caption" in report.would_fail
    add_row(images, file_name="0.png", text="a <toy> square")
    report = look(tiny_config(tmp_path, images, *words))
    assert report.would_fail is None and report.figures["parameters"]["trained"] == 2 * 16


def test_a_cache_takes_the_disk_that_was_foretold(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LatentCodec(vae()).save(tmp_path / "vae")
    unet = UNET | {"in_channels": 4, "out_channels": 4}
    caches = ("--data.cache_latents=true", "--data.cache_crops=2", f"--model.vae={tmp_path / 'vae'}")
    config = tiny_config(tmp_path, images, f"--model.unet={json.dumps(unet)}", *caches, max_train_steps=1)
    foretold = look(config).figures["disk"]["needed"]["latents"]
    assert [path.name for path in (tmp_path / "run/cache").iterdir()] == ["index.jsonl"]
    with monkeypatch.context() as full:
        full.setattr(preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": foretold}))
        report = look(config)
        assert report.would_fail and f"{tmp_path / 'run'}" in report.would_fail
        assert re.search(rf" \d+ bytes \(\S+ [KM]iB\) are needed and {foretold} bytes .* are free", report.would_fail)
    train(config, progress=False)
    shards = [read_safetensors(path) for path in (tmp_path / "run/cache/latents").rglob("*.safetensors")]
    assert foretold == sum(tensor.nbytes for shard in shards for tensor in shard.values()) > 0
    assert "is finished" in look(config).notes[0]
    after = look(_with(config, max_train_steps=2))
    assert after.figures["disk"]["needed"]["latents"] == 0 and after.would_fail is None


def test_a_run_that_cannot_go_on(tmp_path: Path, images: Path) -> None:
    train(tiny_config(tmp_path, images, max_train_steps=2), progress=False)
    longer = look(tiny_config(tmp_path, images, max_train_steps=3))
    assert longer.would_fail is None and any("goes on from step 2" in note for note in longer.notes)
    other = look(tiny_config(tmp_path, images, max_train_steps=1, seed=1))
    assert [fault.reason for fault in other.faults if "train.seed: 0 -> 1" in fault.reason]
    assert [fault.reason for fault in other.faults if "has taken more" in fault.reason]
    add_row(images, file_name="0.png", text="another")
    changed = look(tiny_config(tmp_path, images, max_train_steps=3)).would_fail
    assert changed and "not those that the run began with" in changed


def test_a_quick_look_passes_what_a_run_would_end_with(tmp_path: Path) -> None:
    quick = ("--data.look=quick", "--data.max_bad_fraction=1", "--model.pixel_mean=0", "--model.pixel_std=1")
    report = look(tiny_config(tmp_path, faulty_folder(tmp_path / "images"), *quick))
    assert report.would_fail and "data.look: quick passes 1 images" in report.would_fail
    report = look(tiny_config(tmp_path, image_folder(tmp_path / "good"), *quick[:2]))
    assert report.would_fail and "data.look: quick measures no pixels" in report.would_fail


def test_for_people_and_for_programs(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 12)
    with open(folder / "metadata.jsonl", "a") as file:
        file.write("no json\n" * 40)
    report = look(tiny_config(tmp_path, folder))
    text, tree = report.as_text(), json.loads(report.as_json())
    assert tree["kinds"] == {"no row": 40, "data": 1} and len(tree["faults"]) == 41
    assert tree["figures"] == report.figures and tree["would_fail"] == report.would_fail
    assert text.count("the line is no JSON") == 10 and "  ... and 30 more" in text
    assert "images      12 of 52 can be used" in text and "8x8         12 images, 3.0 batches an epoch" in text
    assert "faults      40 no row" in text and text.splitlines()[-2] == "training would fail:"
    assert all(len(line) < 400 for line in text.splitlines())
