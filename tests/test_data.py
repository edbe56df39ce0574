"""Sources, and the look at every image before the first step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import COLOURS, image_folder

from diffusion_unet.errors import InputError
from training.buckets import cover
from training.config import DataConfig
from training.data import Dataset, describe_bad, inspect, open_data, too_many_bad
from training.decoding import fit
from training.sources import open_source


def settings(folder: Path | str, **more: Any) -> DataConfig:
    return DataConfig(train_data_dir=str(folder), **{"resolution": 8, **more})


def look(folder: Path | str, channels: int = 3, **more: Any) -> Dataset:
    config = settings(folder, **more)
    return inspect(open_source(config, channels), config, channels)


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    dataset = look(image_folder(tmp_path / "data"))
    assert len(dataset) == 12 and not dataset.bad and too_many_bad(dataset, settings("x")) is None
    assert dataset.captions[0] == ["a red square"] and dataset.captions[1] == ["a green square", "green"]
    assert [dataset.caption(1, u) for u in (0.0, 0.49, 0.5, 0.99)] == ["a green square"] * 2 + ["green"] * 2
    assert dataset.image(0).shape == (8, 11, 3) and dataset.image(0).dtype == np.uint8
    assert dataset.source.name(2) == f"{tmp_path / 'data' / 'metadata.jsonl'}, row 3, '2.png'"


def test_pixel_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    dataset = look(image_folder(tmp_path / "data"))
    values = np.concatenate([dataset.image(i).ravel() for i in range(len(dataset))]).astype(np.float64) / 127.5 - 1
    assert dataset.mean == pytest.approx(values.mean(), abs=1e-12)
    assert dataset.std == pytest.approx(values.std(), abs=1e-12)


def test_images_beyond_the_memory_limit_are_the_same(tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    cached, decoded = look(tmp_path / "data"), look(tmp_path / "data", cache_in_memory=0)
    assert len(cached.cached) == 12 and not decoded.cached
    assert cached.fingerprint == decoded.fingerprint
    crop, flip = torch.rand(12, 2, dtype=torch.float64), torch.arange(12) % 2 == 0
    assert torch.equal(cached.images(range(12), crop, flip), decoded.images(range(12), crop, flip))


def test_crops_and_flips(tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    dataset = look(tmp_path / "data")
    whole = dataset.image(3)  # 8 x 11
    crop = torch.tensor([[0.0, 0.0], [0.99, 0.99], [0.5, 0.5]], dtype=torch.float64)
    images = dataset.images([3, 3, 3], crop, torch.tensor([False, False, True])).numpy()
    assert np.array_equal(images[0], whole[:, :8])
    assert np.array_equal(images[1], whole[:, 3:])
    assert np.array_equal(images[2], whole[:, 2:10][:, ::-1])


def test_every_place_of_a_crop_is_as_likely(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(10, dtype=np.uint8)[None, :, None], (8, 10, 3))
    dataset = look(image_folder(tmp_path / "data", 1))
    dataset.cached[0] = ramp
    u = torch.stack([torch.zeros(3000), (torch.arange(3000) + 0.5) / 3000], dim=1).double()
    lefts = dataset.images([0] * 3000, u, torch.zeros(3000, dtype=torch.bool))[:, 0, 0, 0]
    assert torch.bincount(lefts.long()).tolist() == [1000, 1000, 1000]


def test_captions_beside_the_images(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "deep/b.JPG", "c.png", "d.png"):
        Image.new("RGB", (9, 9), "red").save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one \n")
    (tmp_path / "deep/b.txt").write_text("two")
    (tmp_path / "c.txt").write_text(" \n")
    dataset = look(tmp_path)
    assert dataset.captions == [["one"], ["two"]]
    assert [Path(bad.name).name for bad in dataset.bad] == ["c.png", "d.png"]
    assert "empty" in dataset.bad[0].reason and "d.txt" in dataset.bad[1].reason


BAD_ROWS = [
    ({"file_name": "none.png", "text": "gone"}, "none.png"),
    ({"file_name": "torn.png", "text": "torn"}, "torn.png"),
    ({"file_name": "0.png"}, "no caption under 'text'"),
    ({"file_name": "0.png", "text": "  "}, "empty"),
    ({"file_name": "0.png", "text": []}, "empty"),
    ({"file_name": "0.png", "text": [1]}, "no caption"),
    ({"file_name": "../outside.png", "text": "out"}, "outside the folder"),
    ({"file_name": "/etc/passwd", "text": "out"}, "outside the folder"),
    ({"file_name": "link.png", "text": "out"}, "outside the folder"),
    ({"file_name": "\ud800.png", "text": "lone surrogate"}, "no file can have this name"),
    ({"file_name": "n" * 300 + ".png", "text": "long"}, "no file can have this name"),
    ({"file_name": "circle.png", "text": "circle"}, "circle"),
    ({"text": "nothing"}, "no file name under 'file_name'"),
    ([1], "no JSON object"),
    ("{cut", "no JSON"),
]


def test_bad_rows_are_listed_with_file_and_row(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", 8)
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:60])
    with open(folder / "metadata.jsonl", "a") as file:
        for row, _ in BAD_ROWS:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n\n")
    dataset = look(folder)
    assert len(dataset) == 8 and len(dataset.bad) == len(BAD_ROWS)
    for number, (bad, (_, reason)) in enumerate(zip(dataset.bad, BAD_ROWS, strict=True)):
        assert f"metadata.jsonl, row {9 + 2 * number}" in bad.name
        assert reason in bad.reason, bad
    refusal = too_many_bad(dataset, settings(folder))
    assert refusal and "15 of 23" in refusal and "data.max_bad_fraction (0.01)" in refusal and "\n" not in refusal
    assert too_many_bad(dataset, settings(folder, max_bad_fraction=0.7)) is None


def test_long_lists_are_cut_for_the_eye(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", 1)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n' * 30)
    dataset = look(folder)
    lines = describe_bad(dataset.bad, Path("run/quarantine.jsonl"))
    assert len(lines) == 21 and "10 more" in lines[-1] and "run/quarantine.jsonl" in lines[-1]
    assert all(line.count("metadata.jsonl, row") == 1 for line in lines[:20])
    assert too_many_bad(dataset, settings(folder, max_bad_fraction=1.0)) is not None


def test_other_columns_and_fewer_samples(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", 3)
    (folder / "metadata.jsonl").write_text('{"image": "1.png", "caption": "x"}\n{"image": "2.png", "caption": "y"}\n')
    dataset = look(folder, image_column="image", caption_column="caption", max_train_samples=1)
    assert dataset.captions == [["x"]]


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda folder: folder / "none", "is no folder"),
        (lambda folder: folder, "neither metadata.jsonl nor metadata.csv nor images"),
    ],
)
def test_no_source(tmp_path: Path, make: Any, part: str) -> None:
    with pytest.raises(InputError, match=part):
        open_source(settings(make(tmp_path)), 3)


def test_colour_under_transparency(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing")
    assert look(tmp_path, background="#ff8000").image(0)[0, 0].tolist() == [255, 128, 0]
    with pytest.raises(InputError, match=r"data\.background: 'nocolour'"):
        look(tmp_path, background="nocolour")


def test_grey_and_colour(tmp_path: Path) -> None:
    image_folder(tmp_path / "data", 4)
    grey = look(tmp_path / "data", channels=1)
    assert grey.image(3).shape == (8, 11, 1)
    assert grey.image(3).max() > 200 > COLOURS["blue"][0]


def test_strips_are_not_enlarged_as_a_whole() -> None:
    for size, channels, shape in (((1, 30_000), 1, (128, 8)), ((5000, 2), 1, (8, 128)), ((7, 7), 3, (8, 8))):
        assert fit(Image.new("L", size), channels, cover(size, (8, 8))).shape == (*shape, channels)


def test_the_fingerprint_is_of_pixels_and_captions(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    before = look(folder).fingerprint
    assert look(folder).fingerprint == before
    Image.new("RGB", (14, 10), (1, 2, 3)).save(folder / "3.png")
    after = look(folder).fingerprint
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red", "one red", 1))
    assert len({before, after, look(folder).fingerprint}) == 3


def test_the_embedded_photographs() -> None:
    dataset = look("fashion-mnist", channels=1, resolution=16, max_train_samples=50)
    assert len(dataset) == 50 and dataset.image(0).shape == (16, 16, 1)
    assert any("ankle boot" in caption for caption in dataset.captions[0])


@pytest.mark.parametrize("name", ["fashion-mnist", "twemoji"])
@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_embedded_sources_have_no_columns(name: str, key: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{key}: {name} has no columns"):
        open_source(settings(name, **{key: "other"}), 3)


def test_a_split_leaves_something_to_train_on(tmp_path: Path) -> None:
    dataset = look(image_folder(tmp_path / "data"))
    kept, held_out = dataset.split(0, 4)
    assert len(kept) == 8 and len(held_out) == 4
    with pytest.raises(InputError, match=r"data\.held_out: 12 of 12"):
        dataset.split(0, 12)


def saved_data_set(folder: Path, tmp: Path, **columns: Any) -> Path:
    import datasets

    image_folder(tmp)
    rows = [json.loads(line) for line in (tmp / "metadata.jsonl").read_text().splitlines()]
    captions = [row["text"] if isinstance(row["text"], list) else [row["text"]] for row in rows]
    table = {"image": [str(tmp / row["file_name"]) for row in rows], "text": captions, **columns}
    saved = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    saved.map(lambda row: row).save_to_disk(str(folder))
    return folder


def test_a_saved_data_set_gives_what_its_folder_gives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = look(saved_data_set(tmp_path / "saved", tmp_path / "data"))
    folder = look(tmp_path / "data")
    assert len(saved) == 12 and not saved.bad
    assert saved.fingerprint == folder.fingerprint
    assert saved.source.name(2) == f"{tmp_path / 'saved'}, row 3"


def test_a_saved_data_set_without_the_column_is_refused(tmp_path: Path) -> None:
    folder = saved_data_set(tmp_path / "saved", tmp_path / "data")
    with pytest.raises(InputError, match=r"data\.caption_column: .* has no column 'caption'; it has image, text"):
        look(folder, caption_column="caption")
    with pytest.raises(InputError, match=r"data\.image_column: column 'text' of .* does not hold images"):
        look(folder, image_column="text")
    (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a data set"):
        look(folder)


def test_images_of_each_aspect_ratio_fill_their_bucket(tmp_path: Path) -> None:
    for number, size in enumerate([(40, 20), (20, 40), (30, 30), (41, 20)]):
        Image.new("RGB", size, (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a picture")
    dataset = look(tmp_path, resolution=16, aspect_buckets=True, bucket_step=4, max_aspect=2.0)
    shapes = [dataset.buckets[bucket] for bucket in dataset.bucket]
    assert shapes == [(8, 16), (16, 8), (16, 16), (8, 16)] or all(h * w <= 256 for h, w in shapes)
    assert dataset.bucket[0] == dataset.bucket[3] != dataset.bucket[1]
    crop, flip = torch.full((2, 2), 0.99).double(), torch.tensor([False, True])
    images = dataset.images([0, 3], crop, flip)
    assert images.shape == (2, *shapes[0], 3) and images[1].unique().tolist() == [0, 150]
    full = [dataset.cover(sample) for sample in (0, 3)]
    (top, left), (mirrored_top, mirrored_left) = dataset.boxes([0, 3], crop, flip)
    assert (top, left) == (full[0][0] - shapes[0][0], full[0][1] - shapes[0][1])
    assert mirrored_top == full[1][0] - shapes[0][0] and mirrored_left == 0


def test_a_box_is_where_the_crop_lies_in_the_mirrored_picture(tmp_path: Path) -> None:
    dataset = look(image_folder(tmp_path / "data"))
    crop, flip = torch.rand(12, 2, dtype=torch.float64), torch.arange(12) % 2 == 0
    images = dataset.images(range(12), crop, flip).numpy()
    for sample, (top, left) in enumerate(dataset.boxes(range(12), crop, flip)):
        whole = dataset.image(sample)[:, ::-1] if flip[sample] else dataset.image(sample)
        assert np.array_equal(images[sample], whole[top : top + 8, left : left + 8])


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from training import sources

    opened: list[str] = []
    original = sources.open_array

    def counting(*given: Any, **named: Any) -> Any:
        opened.append(str(named.get("name")))
        return original(*given, **named)

    monkeypatch.setattr(sources, "open_array", counting)
    return opened


def test_what_was_seen_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, index = image_folder(tmp_path / "data"), tmp_path / "index.jsonl"
    (folder / "5.png").write_bytes(b"no picture")
    config, opened = settings(folder), count_decoded(monkeypatch)

    def again(**changes: Any) -> Dataset:
        opened.clear()
        changed = settings(folder, **changes)
        return inspect(open_source(changed, 3), changed, 3, index=index)

    first = again()
    assert len(opened) == 12 and len(first) == 11
    second = again()
    assert not opened and second.fingerprint == first.fingerprint and second.bad == first.bad
    assert (second.mean, second.std, second.sizes) == (first.mean, first.std, first.sizes)
    Image.new("RGB", (14, 10), (1, 2, 3)).save(folder / "3.png")
    third = again()
    assert len(opened) == 1 and third.fingerprint != first.fingerprint
    assert third.fingerprint == inspect(open_source(config, 3), config, 3).fingerprint
    again(resolution=6)
    assert len(opened) == 12  # other pixels
    index.write_text(index.read_text()[:-30])
    again(resolution=6)
    assert len(opened) == 12  # cut short, so nothing in it counts


def test_a_quick_look_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder(tmp_path / "data")
    opened = count_decoded(monkeypatch)
    dataset = look(folder, look="quick")
    assert not opened and len(dataset) == 12 and dataset.sizes == [(14, 10)] * 12
    assert np.isnan(dataset.mean) and dataset.fingerprint != look(folder).fingerprint
    assert np.array_equal(dataset.image(3), look(folder).image(3))


def test_small_images_are_set_apart(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", 3)
    Image.new("RGB", (30, 9)).save(folder / "1.png")
    dataset = look(folder, min_size=10)
    assert len(dataset) == 2 and "30x9 pixels, and data.min_size is 10" in dataset.bad[0].reason


def test_classes_and_nothing_are_told_in_the_place_of_captions(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image_folder(tmp_path / "data" / name, 2)
        (tmp_path / "data" / name / "metadata.jsonl").unlink()
    config = settings(tmp_path / "data")
    assert inspect(open_source(config, 3), config, 3, told="label").captions == [["cat"]] * 2 + [["dog"]] * 2
    assert inspect(open_source(config, 3), config, 3, told="nothing").captions == [[""]] * 4


def test_images_of_the_class_come_after_those_of_the_instance(tmp_path: Path) -> None:
    for name, count in (("mine", 3), ("others", 5)):
        image_folder(tmp_path / name, count)
    more = {"class_data_dir": str(tmp_path / "others"), "class_prompt": "a dog", "instance_prompt": "a sks dog"}
    config = settings(tmp_path / "mine", **more)
    dataset = inspect(open_data(config, 3), config, 3)
    assert len(dataset) == 8 and dataset.instances == 3
    assert dataset.captions == [["a sks dog"]] * 3 + [["a dog"]] * 5
    kept, held_out = dataset.split(0, 1)
    assert len(held_out) == 1 and held_out[0] < 3 and sorted(kept + held_out) == list(range(8))
    assert str(tmp_path / "others") in dataset.source.name(3)
    with pytest.raises(InputError, match=r"data\.class_data_dir: .* is no folder"):
        open_data(settings(tmp_path / "mine", class_data_dir="none", class_prompt="x"), 3)
