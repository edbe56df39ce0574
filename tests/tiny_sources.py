"""A handful of pictures, and what the tests of sources ask of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_unet.errors import InputError
from training.config import DataConfig
from training.sources import Source, open_source

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 7, 10, 3), dtype=np.uint8)  # N H W C


def settings(path: Path | str | None, **more: Any) -> DataConfig:
    return DataConfig(train_data_dir=None if path is None else str(path), **more)


def opened(path: Path | str | None, channels: int = 3, **more: Any) -> Source:
    return open_source(settings(path, **more), channels)


def png(number: int, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(file, "PNG", **options)
    return file.getvalue()


def shown(source: Source, index: int) -> bool:
    """Whether sample `index` is picture `index`, and its size is told right."""
    return np.array_equal(np.array(source.image(index)), PIXELS[index]) and source.size(index) == (10, 7)


def fault(work: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return folder
