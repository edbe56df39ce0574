"""Records: into a PNG and back to the bit, read by Pillow itself; and those of strangers, each fault one line."""

import hashlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import nn

from diffusion_unet.errors import InputError
from diffusion_unet.images import RECORD, save_png, to_image
from sampling.record import FIELDS, FORMAT, attach, environment, file_entry, parse_record, read_picture, record_of

HASH = "0123456789abcdef" * 4
MODEL: Any = SimpleNamespace(unet=nn.Linear(2, 2).to(torch.bfloat16))
LEVELS = [14.614641922117643, 0.1 + 0.2, 1e-9, 0.0]
REQUEST: dict[str, Any] = {
    "model": "runs/a, b/model",
    "prompt": 'a "coat", 日本\nof wool',
    "negative_prompt": "blur",
    "seed": 2**64 - 1,
    "variation_seed": 4,
    "variation_strength": 0.25,
    "rng": "nv",
    "steps": 3,
    "solver": "dpm++2m",
    "spacing": "karras",
    "sigmas": LEVELS,
    "guidance_scale": 4.0,
    "guidance_rescale": 0.7,
    "interval": (0.28, None),
    "size": (6, 9),
    "exact": False,
    "batch_size": 2,
    "image": {"path": "in.png", "sha256": HASH},
    "mask": None,
    "strength": 0.5,
    "adapters": [{"kind": "lora", "path": "a.safetensors", "sha256": HASH, "scale": 1.0}],
}
NEEDED = {"model_hash": HASH, "seed": 1, "steps": 2, "solver": "ddim", "guidance_scale": 1}


@pytest.fixture
def picture() -> Image.Image:
    return to_image(np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3))


def refused(text: str) -> str:
    with pytest.raises(InputError) as error:
        parse_record(text, "a.png: its record")
    line = str(error.value)
    assert line.startswith("a.png: its record") and "\n" not in line and len(line) < 400 and line.isascii()
    return line


# --- there and back


def test_a_record_goes_through_a_file_to_the_bit(picture: Image.Image, tmp_path: Path) -> None:
    record = record_of(MODEL, HASH, REQUEST)
    attach(picture, record)
    save_png(tmp_path / "a.png", picture)
    again, read = read_picture(tmp_path / "a.png")
    assert read == record and np.array_equal(np.asarray(again), np.asarray(picture))
    assert [value.hex() for value in read["sigmas"]] == [value.hex() for value in LEVELS]
    assert read["format"] == FORMAT and read["interval"] == [0.28] and "mask" not in read
    assert read["seed"] == 2**64 - 1 and read["prompt"] == REQUEST["prompt"]


def test_other_programs_read_it(picture: Image.Image, tmp_path: Path) -> None:
    attach(picture, record_of(MODEL, HASH, REQUEST))
    save_png(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text.keys() == {RECORD, "parameters"}
        assert json.loads(image.text[RECORD])["dtype"] == "bfloat16"
        version = json.loads(image.text[RECORD])["versions"]["diffusion_unet"]
        assert image.text["parameters"].split("\n") == [
            'a "coat", 日本',
            "of wool",
            "Negative prompt: blur",
            "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.0, Seed: 18446744073709551615, Size: 9x6,"
            ' Model hash: 0123456789, Model: "runs/a, b/model", Variation seed: 4, Variation seed strength: 0.25,'
            f" Denoising strength: 0.5, RNG: NV, Version: diffusion-unet {version}",
        ]


def test_what_says_nothing_is_left_out(picture: Image.Image) -> None:
    record = record_of(MODEL, HASH, {**NEEDED, "adapters": [], "interval": (None, None), "prompt": None})
    assert record.keys() == {"format", *NEEDED, *environment(MODEL)} <= FIELDS.keys()
    attach(picture, record)
    assert picture.info["parameters"].startswith("\nSteps: 2, Sampler: DDIM, CFG scale: 1.0, Seed: 1, Size: 9x6")
    assert "Variation" not in picture.info["parameters"] and "RNG" not in picture.info["parameters"]
    assert record_of(MODEL, HASH, {**NEEDED, "interval": (None, 5.42)})["interval"] == [0, 5.42]


def test_a_record_that_none_can_read_is_not_written() -> None:
    with pytest.raises(InputError, match="guidance_scale"):
        record_of(MODEL, HASH, {**NEEDED, "guidance_scale": "4"})
    with pytest.raises(AssertionError, match="guidance"):
        record_of(MODEL, HASH, {**NEEDED, "guidance": 4})


def test_the_environment_is_that_of_this_process() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    there = environment(MODEL)
    torch.set_num_threads(threads)
    assert there["threads"] == threads + 1 and there["device"] == "cpu" and there["dtype"] == "bfloat16"
    assert there["versions"]["torch"] == str(torch.__version__)
    assert {"diffusion_unet", "torch", "diffusers", "transformers", "python", "cpu"} <= there["versions"].keys()


def test_files_are_known_by_their_bytes(tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "net" / "deep").mkdir(parents=True)
    (tmp_path / "net" / "config.json").write_bytes(b"{}")
    (tmp_path / "net" / "deep" / "w").write_bytes(b"12")
    assert file_entry(tmp_path / "net" / "config.json")["sha256"] == hashlib.sha256(b"{}").hexdigest()
    before = file_entry(tmp_path / "net")
    assert before["path"] == str(tmp_path / "net")
    (tmp_path / "net" / "deep" / "w").write_bytes(b"13")
    assert file_entry(tmp_path / "net")["sha256"] != before["sha256"]
    assert file_entry(b"{}") == {"sha256": hashlib.sha256(b"{}").hexdigest()}
    pixels = file_entry(picture)
    assert "path" not in pixels and pixels == file_entry(picture.copy()) != file_entry(picture.convert("L"))
    with pytest.raises(InputError, match=r"none\.png: is no file"):
        file_entry(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no file"):
        file_entry(tmp_path / "pipe")


# --- strangers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": None}, "no seed"),
        ({"model_hash": None}, "no model_hash"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": True}, "seed is True"),
        ({"seed": "1"}, "seed is '1'"),
        ({"seed": [1]}, "seed is [1]"),
        ({"steps": 10**9}, "steps is 1000000000"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"prompt": {"a": 1}}, "prompt is {'a': 1}"),
        ({"guidance_scale": "4"}, "guidance_scale is '4'"),
        ({"model_hash": "../../etc"}, "model_hash is '../../etc'"),
        ({"model_hash": HASH.upper()}, "model_hash is"),
        ({"model": "a\0b"}, "model is 'a\\x00b'"),
        ({"sigmas": 3}, "sigmas is 3"),
        ({"sigmas": [1, "0"]}, "sigmas is [1, '0']"),
        ({"sigmas": [1, None]}, "sigmas is [1, None]"),
        ({"sigmas": [0]}, "sigmas is '[0.0]'"),
        ({"sigmas": list(range(10_002, 0, -1))}, "sigmas is"),
        ({"sigmas": [1e300, 0]}, "sigmas is [1e+300, 0]"),
        ({"size": [8]}, "size is '[8]'"),
        ({"size": [8, 8, 3]}, "size is '[8, 8, 3]'"),
        ({"size": [8, 0]}, "size is [8, 0]"),
        ({"interval": [1, 2, 3]}, "interval is"),
        ({"threads": 10**6}, "threads is 1000000"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"dtype": "__class__"}, "dtype is '__class__'"),
        ({"device": "cuda:0; rm"}, "device is 'cuda:0; rm'"),
        ({"versions": {"torch": 2}}, "versions is"),
        ({"image": "in.png"}, "image is 'in.png'"),
        ({"image": {"path": "in.png"}}, "image is"),
        ({"image": {"path": "a\0", "sha256": HASH}}, "image is"),
        ({"mask": {"path": 3, "sha256": HASH}}, "mask: path is 3"),
        ({"adapters": {}}, "adapters is {}"),
        ({"adapters": [{"path": "a", "sha256": HASH}]}, "an adapter is"),
        ({"adapters": [{"kind": "lora", "path": "a", "sha256": HASH, "scale": "1"}]}, "scale is '1'"),
        ({"adapters": [{"kind": "lora", "path": "a", "sha256": HASH}] * 65}, "adapters is"),
        ({"variation_strength": 2}, "variation_strength is 2"),
    ],
)
def test_a_field_that_cannot_be_is_named(change: dict[str, Any], words: str) -> None:
    assert words in refused(json.dumps({**NEEDED, **change}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ("steps: 3", "is no JSON"),
        ("[1]", "holds a list"),
        (json.dumps(NEEDED).replace("1}", "NaN}"), "not finite"),
        (json.dumps(NEEDED).replace("1}", "1e999}"), "not finite"),
        (json.dumps(NEEDED).replace("1}", "1" * 5000 + "}"), "5000 digits"),
        (json.dumps(NEEDED).replace('"seed"', '"seed": 2, "seed"'), "twice"),
        ('{"a": ' + "[" * 100_000, "is no JSON"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "levels deep"),
        ('{"a": [' + "[]," * 300_000 + "0]}", "values"),
        (json.dumps({**NEEDED, "prompt": "a" * 2**20}), "too large"),
    ],
    ids=["empty", "words", "list", "nan", "infinite", "digits", "twice", "open", "deep", "many", "long"],
)
def test_what_is_no_record_is_refused(text: str, words: str) -> None:
    assert words in refused(text)


def test_one_of_a_newer_format() -> None:
    line = refused(json.dumps({"format": FORMAT + 1, "shape": "unknown"}))
    assert f"format '{FORMAT + 1}'" in line and "update" in line


def test_fields_that_are_not_known_are_left_out() -> None:
    assert parse_record(json.dumps({**NEEDED, "run": "rm", "mask": None}), "a") == NEEDED


def written(path: Path, image: Image.Image, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text, zip=len(text) > 100_000)
    image.save(path, "PNG", pnginfo=info)
    return path


def test_files_without_a_record(tmp_path: Path, picture: Image.Image) -> None:
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG")
    whole = written(tmp_path / "whole.png", picture, **{RECORD: json.dumps(NEEDED)})
    assert read_picture(whole)[1] == NEEDED
    (tmp_path / "photo.png").write_bytes(jpeg.getvalue())
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-30])
    (tmp_path / "folder.png").mkdir()
    written(tmp_path / "plain.png", picture)
    written(tmp_path / "a1111.png", picture, parameters="a coat\nSteps: 20")
    written(tmp_path / "bomb.png", picture, **{RECORD: '{"prompt": "' + "a" * 3_000_000 + '"}'})
    for name, words in {
        "missing.png": "is no file",
        "folder.png": "is no file",
        "photo.png": "no PNG file",
        "text.png": "no PNG file",
        "cut.png": "cannot be used",
        "plain.png": "holds no record",
        "a1111.png": "another program",
        "bomb.png": "cannot be used",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            read_picture(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
