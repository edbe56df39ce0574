"""Pictures drawn again from their records: the same bits, how far off, and the model and the files that they need."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sampling.replay
from diffusion_unet.codec import PixelCodec
from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.images import save_png, to_image
from diffusion_unet.model import DiffusionModel
from diffusion_unet.prompts import ClassLabels
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet
from sampling import sample
from sampling.record import FIELDS, attach, file_entry, record_of
from sampling.replay import Replayed, replay, request_of

DRAWN = {"steps": 2, "solver": "ddim", "guidance_scale": 2.0, "spacing": "trailing", "negative_prompt": "bag"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(seed: int) -> DiffusionModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": None,
        "num_class_embeds": 3,
    }
    unet = UNet(UNetConfig.from_diffusers(config)).eval()
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    return DiffusionModel(unet, schedule, ClassLabels(["bag", "coat"]), PixelCodec(1, 0.0, 0.5))


@pytest.fixture(scope="module")
def made_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, Path]:
    model = made(0)
    return model, model.save(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def model(made_model: tuple[DiffusionModel, Path]) -> DiffusionModel:
    return made_model[0]


@pytest.fixture
def folder(made_model: tuple[DiffusionModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's, where nothing else is found near the working folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return made_model[1]


@pytest.fixture
def picture(model: DiffusionModel, folder: Path, tmp_path: Path) -> Path:
    return drawn(model, tmp_path / "a" / "b" / "c" / "00000-5.png", model=str(folder))


def drawn(own: DiffusionModel, path: Path, **changes: Any) -> Path:
    image = sample(own, ["coat"], seeds=[5], **DRAWN)[0]
    attach(image, record_of(own, own.fingerprint(), {"prompt": "coat", "seed": 5, **DRAWN, **changes}))
    save_png(path, image)
    return path


def rewritten(path: Path, pixels: np.ndarray | None = None, **changes: Any) -> Path:
    """The same picture with other pixels, or with a record in which some fields are changed."""
    with Image.open(path) as image:
        record = json.loads(image.info["diffusion_unet"])
        array = np.asarray(image) if pixels is None else pixels
    save_png(path.with_name("changed.png"), to_image(array), {**record, **changes})
    return path.with_name("changed.png")


def refused(*arguments: Any, **named: Any) -> str:
    with pytest.raises(InputError) as error:
        replay(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the same picture


def test_a_picture_is_drawn_again_to_the_bit(picture: Path, folder: Path) -> None:
    result = replay(picture)
    with Image.open(picture) as before:
        assert np.array_equal(np.asarray(result.image), np.asarray(before))
    assert result.same and (result.largest, result.mean, result.share) == (0, 0, 0) and result.differences == ()
    assert result.model == folder and str(result) == f"bit-identical, drawn with {folder}"


def test_how_far_off_it_is(picture: Path) -> None:
    with Image.open(picture) as image:
        pixels = np.array(image)
    pixels[0, :4] ^= 16  # 16 up or down, nothing wraps around
    result = replay(rewritten(picture, pixels, versions={"torch": "1.0\n", "cpu": "AVX9"}, batch_size=4))
    assert (result.largest, result.mean, result.share) == (16, 1.0, 4 / 64) and not result.same
    assert any(line.startswith("torch 1.0\\n then, ") for line in result.differences)
    assert "in a batch of 4 then, alone here" in result.differences
    assert str(result).startswith("another picture: ") and "\n" not in str(result) and "cpu AVX9 then" in str(result)


def test_one_of_255_is_the_same_picture() -> None:
    near = Replayed(Image.new("L", (1, 1)), Path("m"), 1, 0.25, 0.25, ())
    assert near.same
    assert str(near).startswith("within 1/255: 25.00% of the bytes differ, by at most 1 and 0.25 on average of 255")


def test_the_threads_are_those_of_the_record(picture: Path) -> None:
    seen = []

    def look(*arguments: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return sample(*arguments, **named)

    result = replay(rewritten(picture, threads=3), draw=look)
    assert seen == [3] and torch.get_num_threads() == 1 and result.differences == ()

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(rewritten(picture, threads=3), draw=fail)
    assert torch.get_num_threads() == 1


def test_a_record_of_few_fields_is_enough(picture: Path, folder: Path) -> None:
    absent = dict.fromkeys(["format", "model", "spacing", "threads", "dtype", "device", "versions"])
    spare = rewritten(picture, **absent, version="0.1.0", size=None)
    assert replay(spare, model=folder).same  # trailing is what this model's own spacing is


def test_a_device_that_is_not_here(picture: Path) -> None:
    result = replay(rewritten(picture, device="cuda:93"))
    assert not result.largest and "device cuda:93 then, cpu here" in result.differences
    assert replay(rewritten(picture, device="meta")).largest == 0
    assert "device nothing is not to be had here" in refused(picture, device="nothing")


def test_what_a_record_asks_of_sample() -> None:
    record = {
        **{"seed": 1, "steps": 3, "spacing": "karras", "solver": "euler_a", "guidance_scale": 3.0, "rng": "nv"},
        **{"sigmas": [3.0, 1.0, 0.5, 0.0], "interval": [0.28], "size": [8, 16], "exact": True, "strength": 0.5},
        **{"guidance_rescale": 0.7, "variation_seed": 3, "variation_strength": 0.5, "threads": 2, "dtype": "float32"},
    }
    assert set(record) <= set(FIELDS)
    passed = {
        **{"solver": "euler_a", "guidance_scale": 3.0, "guidance_rescale": 0.7, "rng": "nv", "exact": True},
        **{"variation_seed": 3, "variation_strength": 0.5, "strength": 0.5, "size": (8, 16)},
    }
    assert request_of(record) == {**passed, "interval": (0.28, None), "sigmas": [3.0, 1.0, 0.5, 0.0]}
    del record["sigmas"], record["interval"]
    assert request_of(record) == {**passed, "steps": 3, "spacing": "karras"}
    assert request_of({"interval": [0.28, 5.42]}) == {"interval": (0.28, 5.42)}


# --- the model


def test_a_record_from_another_model(picture: Path, tmp_path: Path, model: DiffusionModel) -> None:
    other = made(1)
    line = refused(picture, model=other.save(tmp_path / "other"))
    assert "a record from another model" in line and str(picture) in line and str(tmp_path / "other") in line
    assert model.fingerprint()[:10] in line and other.fingerprint()[:10] in line
    assert "is not there" in refused(picture, model=tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["elsewhere/runs/one/model", "a/b/c", "a/b/model", "a/m", "given", "given/x"])
def test_the_model_is_found_by_its_hash(picture: Path, folder: Path, tmp_path: Path, place: str) -> None:
    made(1).save(tmp_path / "a/b/another")  # which is looked at, and is not the one
    (tmp_path / "a" / "broken").mkdir()
    (tmp_path / "a" / "broken" / "model_index.json").write_text("{")
    moved = rewritten(picture, model="gone/model")
    folders = [tmp_path / "given"]
    assert (
        "gone/model" in (line := refused(moved, folders=folders)) and "--model DIR" in line and "none of the 2" in line
    )
    shutil.copytree(folder, tmp_path / place, dirs_exist_ok=True)
    result = replay(moved, folders=folders)
    assert not result.largest and result.model.resolve() == tmp_path / place


@pytest.mark.parametrize("path", ["/dev/zero", "x" * 5000, "a/" * 2000, "~", ""])
def test_a_path_that_no_model_has(picture: Path, path: str) -> None:
    line = refused(rewritten(picture, model=path))
    assert "none of the 0" in line and len(line) < 1000


def test_weights_are_cast_as_they_were(model: DiffusionModel, folder: Path, tmp_path: Path) -> None:
    half = DiffusionModel.load(folder, dtype=torch.bfloat16)
    result = replay(drawn(half, tmp_path / "half.png"), model=folder)
    assert not result.largest and result.differences == ()
    assert half.fingerprint() != model.fingerprint()


# --- what else it was drawn with


def test_files_are_found_by_their_bytes(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, mask, lora = (tmp_path / name for name in ("in.png", "mask.png", "a.safetensors"))
    for number, path in enumerate((source, mask, lora)):
        path.write_bytes(bytes([number]))
    (net := tmp_path / "net").mkdir()
    (net / "config.json").write_text("{}")
    adapters = [
        {"kind": "ip_adapter", **file_entry(lora), "scale": 1, "image": file_entry(source), "encoder": file_entry(net)},
        {"kind": "lora", **file_entry(lora), "scale": 0.5},
        {"kind": "controlnet", **file_entry(net), "scale": -1, "image": file_entry(source)},
    ]
    put_on: list[dict[str, Any]] = []
    monkeypatch.setattr(sampling.replay, "with_adapters", lambda model, **given: put_on.append(given) or model)
    asked = rewritten(picture, image=file_entry(source), mask=file_entry(mask), adapters=adapters, strength=0.5)
    seen: list[dict[str, Any]] = []

    def look(found: Any, prompts: Any, **named: Any) -> Any:
        seen.append(named)
        return sample(found, prompts, seeds=named["seeds"], **DRAWN)

    def wanted(source: Path) -> dict[str, Any]:
        named = {"loras": [(lora, 0.5)], "controlnets": [(net, source, -1.0)], "size": (8, 8)}
        return {**named, "ip_adapter": (lora, net, source, 1.0)}

    assert not replay(asked, draw=look).largest
    assert {"image": source, "mask": mask, "strength": 0.5}.items() <= seen[0].items() and put_on == [wanted(source)]
    moved = source.rename(tmp_path / "moved.png")
    assert "in.png" in (line := refused(asked, draw=look)) and "--file FILE" in line
    source.write_bytes(b"another")
    assert "was changed since" in refused(asked, draw=look)
    assert not replay(asked, files=[moved], draw=look).largest
    assert seen[1]["image"] == moved and put_on[1] == wanted(moved)
    (net / "config.json").write_text("{ }")
    assert "the encoder of its ip_adapter" in refused(asked, files=[moved], draw=look)
    strange = {**file_entry(lora), "scale": 1}
    several = [{**strange, "kind": "rm"}], [{**strange, "kind": "controlnet"}]
    for kind, words in zip(several, ("kind 'rm'", "lacks its image"), strict=True):
        assert words in refused(rewritten(picture, adapters=kind))
    assert "is none of the files" in refused(picture, files=[moved])
    no_file = rewritten(picture, image={"sha256": hashlib.sha256(b"bytes").hexdigest()})
    assert "was no file" in refused(no_file)


def test_pixels_that_are_not_those_drawn(picture: Path, model: DiffusionModel) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    assert "pixels were changed" in refused(rewritten(picture, pixels))
    assert "pixels were changed" in refused(rewritten(picture, pixels[:4, :4, 0]))
    assert "pixels were changed" in refused(rewritten(picture, size=[8, 9]))


def test_a_request_that_cannot_be_is_refused_by_the_sampler(picture: Path) -> None:
    assert "solver 'rm' is not known" in refused(rewritten(picture, solver="rm"))
    assert "shoe" in refused(rewritten(picture, prompt="shoe"))
    assert torch.get_num_threads() == 1
