"""What diffusers' text-to-image script uses of torchvision.transforms, for Pillow images, where torchvision is not
installed. It stands in for the measurement alone (train_throughput.py): one picture at a time, as there.
"""

import enum
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(enum.Enum):
    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    BOX = Image.Resampling.BOX
    HAMMING = Image.Resampling.HAMMING
    LANCZOS = Image.Resampling.LANCZOS


class Compose:
    """One after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]):
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


class Resize:
    """The shorter side to `size` pixels, the other in proportion."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR):
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        if shorter == self.size:
            return image
        width, height = (int(self.size * side / shorter) for side in image.size)
        return image.resize((width, height), self.interpolation.value)


class RandomCrop:
    """A square of `size` pixels at any place."""

    def __init__(self, size: int):
        self.size = size

    def place(self, room: int) -> int:
        return random.randint(0, room)

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (self.place(side - self.size) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class CenterCrop(RandomCrop):
    """The square of `size` pixels in the middle."""

    def place(self, room: int) -> int:
        return round(room / 2)


class RandomHorizontalFlip:
    """Mirrors half of the images."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


class Lambda:
    """Any function of one image."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, value: Any) -> Any:
        return self.function(value)


class ToTensor:
    """An RGB image to float32 [3, H, W] in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image))  # uint8 [H, W, 3]
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    """(x - mean) / std by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        return x.sub(self.mean).div_(self.std)
