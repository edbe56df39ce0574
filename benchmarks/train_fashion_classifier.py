"""Trains the classifier that scores the quickstart's pictures, on 60,000 images that the quickstart does not train on.

    python benchmarks/train_fashion_classifier.py FOLDER [OUT]

FOLDER holds the data set's four files, /usr/share/datasets/fashion-mnist with Debian's package dataset-fashion-mnist.
About four minutes on two cores. Prints the accuracy on the 10,000 images of the other file, as they are and after a
detour through other sizes, and writes it into OUT's metadata: it is the ceiling of what a perfect model scores.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from training.fashion import Classifier, load, resize

OUT = Path(__file__).parents[1] / "diffusion_unet" / "assets" / "fashion-classifier.safetensors"
SIZES = (16, 20, 24, 28, 32)  # pixels, of the pictures that it should judge alike
EPOCHS, BATCH, PEAK_RATE = 10, 128, 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, test = load(arguments.folder, "train"), load(arguments.folder, "t10k")
    classifier = Classifier()
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit(classifier, torch.tensor(train.images), torch.tensor(train.labels))
    classifier.half().float().eval()  # the file holds half precision: measure what it holds
    accuracy = {size: score(classifier, torch.tensor(test.images), torch.tensor(test.labels), size) for size in SIZES}
    for size, value in accuracy.items():
        print(f"accuracy on 10,000 real images{'' if size == 28 else f' resized to {size} px and back'}: {value:.4f}")
    weights = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in classifier.state_dict().items()
    }
    save_file(
        weights, arguments.out, metadata={f"accuracy_{size}px": f"{value:.4f}" for size, value in accuracy.items()}
    )
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


def fit(classifier: Classifier, images: Tensor, labels: Tensor) -> None:
    """Trains on images uint8 [N, 28, 28] and labels [N]; the rate rises over a tenth of it and falls along a cosine."""
    steps = EPOCHS * len(images) // BATCH
    optimizer = torch.optim.AdamW(classifier.parameters(), PEAK_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * step / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start = time.perf_counter()
    for step in range(steps):
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images))
        rows = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)]
        x = augment(images[rows][:, None].float() / 255).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(classifier.logits(x), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)


def augment(x: Tensor) -> Tensor:
    """Images [B, 1, 28, 28], moved by up to 1 pixel, half mirrored; three quarters through another size and back.

    Every batch has all kinds in it: batch normalization is to see the same mixture in training that its averages hold.
    """
    padded = F.pad(x, (1, 1, 1, 1))
    left, top = torch.randint(0, 3, (2, len(x), 1, 1))
    rows = (top + torch.arange(28)[:, None]).expand(-1, 28, 28)  # B 28 28
    columns = (left + torch.arange(28)).expand(-1, 28, 28)
    x = padded[torch.arange(len(x))[:, None, None], 0, rows, columns][:, None]
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    sizes = (28, SIZES[0], SIZES[0], SIZES[int(torch.randint(1, len(SIZES), ()))])  # most of what it judges is small
    return torch.cat([resize(resize(part, size), 28) for part, size in zip(x.chunk(4), sizes, strict=True)])


@torch.no_grad()
def score(classifier: Classifier, images: Tensor, labels: Tensor, size: int) -> float:
    """Share of images uint8 [N, 28, 28] that are recognised after they were resized to `size` pixels."""
    hits = 0
    for rows in torch.arange(len(images)).split(500):
        x = resize(images[rows][:, None].float(), size)
        detour = x.round().clamp(0, 255).to(torch.uint8)[:, 0]
        hits += int((classifier(detour).argmax(1) == labels[rows]).sum())
    return hits / len(images)


if __name__ == "__main__":
    main()
