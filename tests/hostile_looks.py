"""What a look at the hostile files makes of each, beside what must become of it.

A picture that is refused is told by its reason, one that is not by its largest difference from the pixels expected.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hostile_files import RGB, Caption, Expected, Hostile, beside, caption_files, listed

from training.config import DataConfig
from training.data import Dataset, describe_bad, inspect, open_data

Layout = Callable[[Path, list[Hostile]], dict[str, Expected]]


def tarred(folder: Path, items: list[Hostile]) -> dict[str, Expected]:
    """Those that are bytes as samples of a tar, whose names have nothing to do with theirs."""
    folder.mkdir(parents=True)
    samples: list[tuple[Hostile | Caption, bytes, bytes, list[str] | None]] = []
    for item in items:
        if isinstance(item.content, bytes):
            samples.append((item, item.content, b"a square", ["a square"]))
    good = next(item.content for item in items if item.name == "ZIP behind.png")
    for caption in caption_files():
        assert isinstance(caption.content, bytes) and isinstance(good, bytes)
        samples.append((caption, good, caption.content, caption.captions))
    expected = {}
    with tarfile.open(folder / "all.tar", "w") as file:
        for number, (item, picture, text, captions) in enumerate(samples):
            for name, data in ((f"{number}.png", picture), (f"{number}.txt", text)):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                file.addfile(about, io.BytesIO(data))
            pixels, within = (item.pixels, item.within) if isinstance(item, Hostile) else (RGB, 0.0)
            name = f"{folder / 'all.tar'}, sample '{number}'"
            expected[name] = Expected(item.name, item.refused, pixels, within, captions)
    return expected


LAYOUTS: dict[str, Layout] = {"beside": beside, "listed": listed, "tarred": tarred}


def looked_at(folder: Path, items: list[Hostile], layout: str) -> Iterator[dict[str, Any]]:
    """{"item", "expected", "got", "ok"} of every sample, and of what is told of all."""
    expected = LAYOUTS[layout](folder, items)
    config = DataConfig(train_data_dir=str(folder), resolution=8)
    source = open_data(config, 3)
    dataset = inspect(source, config, 3)
    places = {source.name(index): index for index in range(len(source))}
    yield outcome("all samples", sorted(expected) == sorted(places), f"{len(expected)} samples", f"{len(places)}")
    lines = describe_bad(dataset.bad, Path("quarantine.jsonl"))
    yield outcome("what is told", all(map(str.isprintable, lines)), "lines of text", "others" if lines else "nothing")
    reasons = {bad.name: bad.reason for bad in dataset.bad}
    for name in expected.keys() & places.keys():
        yield _one(dataset, places[name], expected[name], reasons.get(name))


def outcome(item: str, ok: bool, expected: str, got: str) -> dict[str, Any]:
    return {"item": item, "expected": expected, "got": expected if ok else got, "ok": ok}


def _one(dataset: Dataset, index: int, expected: Expected, reason: str | None) -> dict[str, Any]:
    told = f"refused: {expected.refused}" if expected.refused else f"pixels within {expected.within:g}"
    if reason is not None:
        ok = expected.refused is not None and re.search(expected.refused, reason) is not None and "\n" not in reason
        return {"item": expected.item, "expected": told, "got": f"refused: {reason[-120:]}", "ok": ok}
    pixels = np.array(dataset.source.image(index)).astype(float)
    if expected.pixels is None or pixels.shape != expected.pixels.shape:
        return {"item": expected.item, "expected": told, "got": f"pixels of shape {pixels.shape}", "ok": False}
    difference = float(np.abs(pixels - expected.pixels).max())
    captions = dataset.captions[dataset.kept.index(index)]
    ok = expected.refused is None and difference <= expected.within and captions == expected.captions
    got = f"pixels within {difference:.3g}" + ("" if captions == expected.captions else f", captions {captions!r:.80}")
    return {"item": expected.item, "expected": told, "got": got, "ok": ok}
