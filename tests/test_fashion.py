"""The embedded photographs, their captions, and the classifier that judges drawn pictures."""

import gzip
import hashlib
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffusion_unet.errors import InputError
from training import fashion

ASSETS = Path(fashion.__file__).parents[1] / "diffusion_unet" / "assets"


def test_the_embedded_files_are_unchanged() -> None:
    sums = {
        "images-idx3": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "labels-idx1": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
    for part, sha256 in sums.items():
        data = gzip.decompress((ASSETS / "fashion-mnist" / f"t10k-{part}-ubyte.gz").read_bytes())
        assert hashlib.sha256(data).hexdigest() == sha256
    assert "Zalando SE" in (ASSETS / "fashion-mnist" / "LICENSE").read_text()


def test_load_gives_images_labels_and_captions() -> None:
    data = fashion.load()
    assert len(data) == 10_000
    assert data.images.shape == (10_000, 28, 28) and data.images.dtype == np.uint8
    assert np.bincount(data.labels).tolist() == [1000] * 10
    image = data.image(0)
    assert (image.size, image.mode) == ((28, 28), "L")
    assert np.array_equal(np.asarray(image), data.images[0])
    assert data.labels[0] == 9 and "a photo of an ankle boot" in data.captions(0)
    assert "7" in data.name(7)


def test_captions_are_english_and_the_held_out_ones_are_not_trained_on() -> None:
    for label, noun in enumerate(fashion.CLASSES):
        trained, held_out = fashion.captions(label), fashion.held_out_captions(label)
        assert len(set(trained)) == len(trained) >= 5 and held_out
        assert not set(trained) & set(held_out)
        for caption in (*trained, *held_out):
            assert noun in caption and "{" not in caption
            words = caption.replace(",", "").split()
            for article, following in itertools.pairwise(words):
                if article in ("a", "an"):
                    assert (article == "an") == (following[0] in "aeiou"), caption
            assert "a trousers" not in caption
    assert "an image showing a sandal" in fashion.held_out_captions(fashion.CLASSES.index("sandal"))
    assert {"a photo of a pair of trousers", "a photo of trousers"} <= set(fashion.captions(1))


def idx(shape: tuple[int, ...], values: bytes, head: bytes = b"\0\0\x08") -> bytes:
    return head + bytes([len(shape)]) + np.array(shape, ">u4").tobytes() + values


def test_read_idx(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx((2, 300), bytes(range(200)) * 3)))
    array = fashion.read_idx(path)
    assert array.shape == (2, 300)
    assert array.ravel().tolist() == list(range(200)) * 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not gzip",
        gzip.compress(b"\0\0"),
        gzip.compress(b""),
        gzip.compress(idx((3,), b"abc"))[:-4],
        gzip.compress(idx((3,), b"ab")),
        gzip.compress(idx((3,), b"abcd")),
        gzip.compress(idx((3,), b"abc", b"\0\0\x0d")),
        gzip.compress(b"\0\0\x08\x03\0\0\0\x01"),
        gzip.compress(b"\0\0\x08\0"),
        gzip.compress(idx((2**32 - 1,) * 9, b"abc")),
    ],
    ids=range(11),  # compressed bytes hold the time
)
def test_damaged_file_is_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gz"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"^[^\n]*damaged\.gz[^\n]*$"):
        fashion.read_idx(path)


def test_missing_or_mixed_up_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz"):
        fashion.load(tmp_path)
    shutil.copytree(ASSETS / "fashion-mnist", tmp_path / "mixed")
    shutil.copy(tmp_path / "mixed" / "t10k-images-idx3-ubyte.gz", tmp_path / "mixed" / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(InputError, match="mixed"):
        fashion.load(tmp_path / "mixed")


def test_classifier_recognises_photographs_at_any_size() -> None:
    data = fashion.load()
    classifier = fashion.Classifier.load()
    assert not classifier.training
    rows = slice(0, 1000)
    wanted = torch.tensor(data.labels[rows])

    def accuracy(images: torch.Tensor) -> float:
        with torch.no_grad():
            return float((classifier(images).argmax(1) == wanted).float().mean())

    assert accuracy(torch.tensor(data.images[rows])) > 0.90
    for size, least in {16: 0.86, 24: 0.89, 32: 0.89}.items():
        resized = [np.asarray(data.image(i).resize((size, size), Image.Resampling.LANCZOS)) for i in range(1000)]
        assert accuracy(torch.tensor(np.stack(resized))) > least, size


def test_classifier_takes_grey_and_colour_alike() -> None:
    classifier = fashion.Classifier.load()
    grey = torch.tensor(fashion.load().images[:8])
    with torch.no_grad():
        logits = classifier(grey)
        assert logits.shape == (8, 10)
        torch.testing.assert_close(classifier(grey[..., None]), logits)
        torch.testing.assert_close(classifier(grey[..., None].expand(-1, -1, -1, 3)), logits)


def test_classifier_file_is_small_and_states_the_ceiling() -> None:
    path = ASSETS / "fashion-classifier.safetensors"
    assert path.stat().st_size <= 200_000
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    # 0.90 for pictures is a high floor only if photographs score higher still.
    assert 0.90 < float(metadata["accuracy_28px"]) < 0.96


def test_a_classifier_file_of_another_shape_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes((ASSETS / "fashion-classifier.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"^[^\n]*short\.safetensors[^\n]*$"):
        fashion.Classifier.load(path)
