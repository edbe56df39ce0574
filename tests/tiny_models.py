"""Model folders of Stable Diffusion 1.x's, 2.x's and XL's kind that run within milliseconds, as stock diffusers saves
them, and a handful of pictures in every form that the recipes read."""

import copy
import functools
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import diffusers
import pyarrow
import pyarrow.parquet
import tiny_pipelines as tiny
from PIL import Image

CAPTIONS = (tiny.PROMPT, tiny.OTHER_PROMPT)
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
SIZES = ((20, 16), (16, 24), (16, 16))  # (W, H)


# --- models -------------------------------------------------------------------------------------------------------


def save_sd1(folder: Path) -> Path:
    return _save(folder, diffusers.StableDiffusionPipeline, tiny.SD, tiny.text_parts() | tiny.unchecked())


def save_sd2(folder: Path, **schedule: Any) -> Path:
    """`schedule`: changes of its noise schedule; it predicts v."""
    scheduler = diffusers.DDIMScheduler.from_config(tiny.ddim().config, prediction_type="v_prediction", **schedule)
    parts = {"scheduler": scheduler, "text_encoder": _open_clip(tiny.text_encoder())}
    return _save(folder, diffusers.StableDiffusionPipeline, tiny.SD2, tiny.text_parts() | tiny.unchecked() | parts)


def save_sdxl(folder: Path) -> Path:
    """As in SDXL's own, the two tokenizers fill up with different tokens."""
    parts = tiny.xl_parts() | {"tokenizer_2": copy.deepcopy(tiny.tokenizer())}
    parts["tokenizer_2"].pad_token = "!"
    parts["text_encoder_2"] = _open_clip(parts["text_encoder_2"])
    return _save(folder, diffusers.StableDiffusionXLPipeline, tiny.XL, parts)


def _open_clip(encoder: Any) -> Any:
    """The same with the activation of OpenCLIP."""
    config = copy.deepcopy(encoder.config)
    config.hidden_act = "gelu"
    kind: Any = type(encoder)
    made = tiny.seeded(functools.partial(kind, config))
    made.load_state_dict(encoder.state_dict())
    return made


def _save(folder: Path, pipeline: Any, config: dict[str, Any], parts: dict[str, Any]) -> Path:
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    unet = tiny.seeded(functools.partial(diffusers.UNet2DConditionModel, **settings))
    pipeline(unet=unet, **parts).save_pretrained(folder)
    return folder


def without_weights(folder: Path, out: Path) -> Path:
    """A copy of a model folder that holds configs and tokenizers only."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


# --- pictures -----------------------------------------------------------------------------------------------------


def picture(number: int) -> Image.Image:
    """A rectangle of one colour on grey."""
    image = Image.new("RGB", SIZES[number % len(SIZES)], "grey")
    image.paste(COLOURS[number % len(COLOURS)], (number % 4, number % 3, number % 4 + 9, number % 3 + 11))
    return image


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def plain_images(folder: Path, count: int = 6) -> Path:
    """Without captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def captioned_images(folder: Path) -> Path:
    plain_images(folder)
    rows = [{"file_name": path.name, "text": CAPTIONS[int(path.stem) % 2]} for path in sorted(folder.glob("*.png"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def tagged_images(folder: Path) -> Path:
    """With a .txt of tags beside each."""
    for path in plain_images(folder).glob("*.png"):
        path.with_suffix(".txt").write_text("boot, a, b, c")
    return folder


def sorted_images(folder: Path) -> Path:
    """In a folder for each of two classes."""
    for name in ("bag", "boot"):
        plain_images(folder / name, 4)
    return folder


def tars(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                members = {"png": png(number), "txt": CAPTIONS[number % 2].encode()}
                for suffix, content in members.items():
                    entry = tarfile.TarInfo(f"{number:06}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def parquet(folder: Path, *columns: str, caption: str) -> Path:
    """`columns` of pictures, each of others, and one of captions."""
    folder.mkdir(parents=True)
    table: dict[str, Any] = {
        name: [{"bytes": png(number + shift), "path": None} for number in range(6)]
        for shift, name in enumerate(columns)
    }
    table[caption] = [CAPTIONS[number % 2] for number in range(6)]
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "train-00000-of-00001.parquet")
    return folder
