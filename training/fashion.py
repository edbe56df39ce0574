"""Fashion-MNIST: 28 x 28 photographs of clothing, with captions; and the classifier that scores drawn pictures.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms" (2017),
arXiv:1708.07747. Its 10,000-image file ships with the package and is what the quickstart trains on. The classifier was
trained by benchmarks/train_fashion_classifier.py on the 60,000 images of the other file, which the model never saw.
"""

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from diffusion_unet.checkpoint import load_state, read_safetensors
from diffusion_unet.errors import InputError

from .decoding import Cover, fit

# In the order of the data set's labels.
CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

# {a} is the noun with its article ("an ankle boot", "a pair of trousers", also "trousers"), {noun} without.
# Short ones and long ones, so that the noun is read wherever it stands.
TRAINED = (
    "{noun}",
    "{a}",
    "a photo of {a}",
    "a picture of {a}",
    "an image of {a}",
    "a small photo of {a}",
    "a photograph of {a}",
    "the picture shows {a}",
    "draw {a}",
    "{a} on a black background",
    "this is a small picture showing {a}",
    "one more black and white photo of {a}",
)
# Never trained on: whoever asks for a picture need not know how the captions were worded. The last has a new word too.
HELD_OUT = (
    "an image showing {a}",
    "a photograph showing {a}",
    "a small picture of {a}",
    "please draw {a}",
)


def captions(label: int) -> tuple[str, ...]:
    """The captions that an image of this class is trained with, in several wordings. `label` is 0 to 9."""
    return _fill(TRAINED, label)


def held_out_captions(label: int) -> tuple[str, ...]:
    """Captions of this class in wordings that are never trained on. `label` is 0 to 9."""
    return _fill(HELD_OUT, label)


def _fill(wordings: tuple[str, ...], label: int) -> tuple[str, ...]:
    noun = CLASSES[label]
    things = (f"a pair of {noun}", noun) if noun == "trousers" else (f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}",)
    return tuple(dict.fromkeys(wording.format(a=thing, noun=noun) for wording in wordings for thing in things))


@dataclass(frozen=True)
class Fashion:
    """Images with labels; also a source of captioned images for training."""

    images: NDArray[np.uint8]  # [N, 28, 28], 0 is the black background
    labels: NDArray[np.int64]  # [N], 0 to 9

    def __len__(self) -> int:
        return len(self.images)

    def captions(self, index: int) -> list[str]:
        """All wordings that fit image `index`."""
        return list(captions(int(self.labels[index])))

    def image(self, index: int) -> Image.Image:
        """Image `index`, 28 x 28, mode L."""
        return Image.fromarray(self.images[index])

    def original(self, index: int) -> Image.Image:
        """There is none: raises InputError."""
        raise InputError("data.original_image_column: fashion-mnist has no pictures to be changed into others")

    def pixels(self, index: int, channels: int, cover: Cover, *, original: bool = False) -> NDArray[np.uint8]:
        """[H, W, C]: picture `index`, covering the (H, W) that `cover` says for its (W, H)."""
        image = self.original(index) if original else self.image(index)
        return fit(image, channels, cover(image.size))

    def label(self, index: int) -> str:
        """The noun of the class of image `index`."""
        return CLASSES[int(self.labels[index])]

    def size(self, index: int) -> tuple[int, int]:
        """(28, 28)."""
        height, width = self.images[index].shape
        return width, height

    def stamp(self, index: int) -> str:
        """A digest of the pixels and captions of image `index`."""
        content = self.images[index].tobytes() + "\n".join(self.captions(index)).encode()
        return hashlib.sha256(content).hexdigest()[:32]

    def name(self, index: int) -> str:
        """Where image `index` comes from, for messages."""
        return f"fashion-mnist, image {index}"


def load(folder: str | Path | None = None, part: str = "t10k") -> Fashion:
    """The 10,000 images that ship with the package, or from a folder with the four files of the data set.

    `part` is "t10k" (10,000 images) or "train" (60,000, in a folder only).
    Raises InputError where a file is missing, cut short, or holds something else."""
    if folder is None:
        folder = Path(str(resources.files("diffusion_unet"))) / "assets" / "fashion-mnist"
    images = read_idx(Path(folder) / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(Path(folder) / f"{part}-labels-idx1-ubyte.gz")
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() >= len(CLASSES):
        raise InputError(
            f"{folder}: images {images.shape} and labels {labels.shape} are not Fashion-MNIST's {part} files"
        )
    return Fashion(images, labels.astype(np.int64))


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """The array in a gzipped IDX file of unsigned bytes.

    The format: two zeros, 8 for unsigned bytes, the rank, a big-endian size for each axis, the values
    (http://yann.lecun.com/exdb/mnist). Raises InputError."""
    try:
        data = gzip.decompress(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file; the package's data is not complete, install it again"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as a gzip file ({error}); copy it again") from None
    rank = data[3] if len(data) > 3 else 0
    start = 4 + 4 * rank
    if data[:3] != b"\0\0\x08" or rank == 0 or len(data) < start:
        raise InputError(f"{path}: not an IDX file of unsigned bytes; copy it again")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", rank, 4))
    if len(data) - start != np.prod(shape, dtype=np.int64):
        raise InputError(
            f"{path}: {len(data) - start} values where its sizes {shape} call for more or fewer; copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


class Classifier(nn.Module):
    """Says which of CLASSES a picture shows, whatever size it was drawn at. 89,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(1, 24, stride=1),
            *_convolution(24, 32, stride=2),
            *_convolution(32, 32, stride=1),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 80, stride=1),
        )
        self.pool = nn.AvgPool2d(3, stride=2)  # keeps roughly where things are: sleeves tell a pullover from a dress
        self.head = nn.Linear(80 * 3 * 3, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of `images`, uint8 [B, H, W] or [B, H, W, C] with C 1 or 3, on a dark background."""
        if images.ndim == 4:
            images = images.float().mean(dim=3)
        x = images[:, None].float() / 255
        x = resize(x, 28)  # B 1 28 28
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of grey images [B, 1, 28, 28], values 0 (black) to 1."""
        x = self.layers((x - 0.2860) / 0.3530)  # B 80 7 7
        logits: Tensor = self.head(self.pool(x).flatten(1))  # B 10
        return logits

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Classifier":
        """The classifier that ships with the package, or the one in a file, in eval mode. Raises InputError."""
        if path is None:
            path = Path(str(resources.files("diffusion_unet"))) / "assets" / "fashion-classifier.safetensors"
        classifier = cls()
        load_state(classifier, read_safetensors(path), str(path))
        return classifier.eval()


def resize(x: Tensor, size: int) -> Tensor:
    """Images [B, C, H, W] scaled to `size` x `size`: bilinear, with the low-pass that shrinking needs."""
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def _convolution(fan_in: int, fan_out: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()
