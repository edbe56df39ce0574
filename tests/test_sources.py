"""Folders, tars and what comes with the package: what was written comes back, and each fault is one line."""

import csv
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_sources import PIXELS, fault, images, opened, png, shown

from training import emoji
from training.sources import Source, unlisted

# ---- folders -------------------------------------------------------------------------------------------------------


def test_caption_files_beside_the_images(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "a.png", "b.png", "c/d.PNG", "e.png", "f.png", ".hidden.png")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf one \n")
    (folder / "b.caption").write_text("two")
    (folder / "c/d.txt").write_text("three")
    (folder / "c/d.caption").write_text("not this one")
    (folder / "e.txt").write_text(" \n")
    (folder / "f.txt").write_bytes(b"\xff\xfe\xff")
    source = opened(folder)
    assert len(source) == 5 and all(shown(source, index) for index in range(4))
    assert [source.captions(index) for index in range(3)] == [["one"], ["two"], ["three"]]
    assert source.name(1) == str(folder / "b.png") and source.label(2) == "c"
    assert fault(source.captions, 3) == f"{folder / 'e.png'}: the caption is empty"
    assert fault(source.captions, 4) == f"{folder / 'f.png'}: no UTF-8 caption file f.txt"
    assert "no text or whole number as label" in fault(source.label, 0)
    assert "data.original_image_column is not set" in fault(source.original, 0)


def test_a_caption_file_that_leads_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "a.png", "b.png")
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "b.txt").write_text("b")
    assert "a.txt lies outside the folder" in fault(opened(folder).captions, 0)


def test_folders_name_what_they_hold(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "ankle_boot/1.png", "bag/2.png", "shoes/old_sandal/3.png", ".trash/4.png")
    source = opened(folder)
    assert len(source) == 3 and all(shown(source, index) for index in range(3))
    assert [source.captions(index) for index in range(3)] == [["ankle boot"], ["bag"], ["old sandal"]]
    assert [source.label(index) for index in range(3)] == ["ankle boot", "bag", "old sandal"]
    prompted = opened(folder, instance_prompt="a photo")
    assert prompted.captions(0) == ["a photo"] and prompted.label(0) == "ankle boot"
    images(folder, "loose.png")
    assert "no UTF-8 caption file" in fault(opened(folder).captions, 0)  # then the folders name nothing


def test_an_instance_prompt_stands_for_all_captions(tmp_path: Path) -> None:
    source = opened(images(tmp_path / "data", "a.png", "b.png"), instance_prompt="a photo of sks dog")
    assert [source.captions(index) for index in range(2)] == [["a photo of sks dog"]] * 2 and shown(source, 1)
    (tmp_path / "data/metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    assert opened(tmp_path / "data", instance_prompt="x").captions(0) == ["x"]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_metadata_of_any_columns(tmp_path: Path, form: str) -> None:
    folder = images(tmp_path / "data", "0.png", "in/1.png", "2.png")
    rows = [
        {"path": "0.png", "says": 'a "red", long\nthing', "kind": "3", "before": "2.png", "more": "x"},
        {"path": "in/1.png", "says": ["one", " two ", ""], "kind": "cat", "before": "0.png", "more": "y"},
        {"path": "2.png", "says": "[tag], [other]", "kind": "", "before": "", "more": "z"},
    ]
    if form == "jsonl":
        (folder / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        with open(folder / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for row in rows:
                says = row["says"]
                writer.writerow({**row, "says": json.dumps(says) if isinstance(says, list) else says})
    columns = {"image_column": "path", "caption_column": "says", "label_column": "kind"}
    source = opened(folder, original_image_column="before", **columns)
    assert len(source) == 3 and all(shown(source, index) for index in range(3))
    assert [source.captions(index) for index in range(3)] == [[rows[0]["says"]], ["one", "two"], ["[tag], [other]"]]
    assert [source.label(0), source.label(1)] == ["3", "cat"]
    assert "under 'kind'" in fault(source.label, 2) and "under 'before'" in fault(source.original, 2)
    assert np.array_equal(np.array(source.original(1)), PIXELS[0])
    row = {"jsonl": 3, "csv": 3}[form]
    assert source.name(1) == f"{folder / f'metadata.{form}'}, row {row}, 'in/1.png'"
    assert "data.label_column is not set" in fault(opened(folder, image_column="path").label, 0)
    assert "(data.caption_column)" in fault(opened(folder, image_column="path").captions, 0)


@pytest.mark.parametrize("label", [3, True, 1.5, None])
def test_labels_are_text_or_whole_numbers(tmp_path: Path, label: Any) -> None:
    folder = images(tmp_path / "data", "0.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "label": label}))
    source = opened(folder, label_column="label")
    if label == 3:
        assert source.label(0) == "3"
    else:
        assert "no text or whole number as label under 'label'" in fault(source.label, 0)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"file_name,text\na.png,\xff\n", "cannot be read as a UTF-8 CSV file"),
        (b'file_name,text\na.png,"open\n', "cannot be read as a UTF-8 CSV file"),
        (b"", "neither metadata.jsonl nor metadata.csv nor images"),
        (b"file_name,text\n", "neither metadata.jsonl nor metadata.csv nor images"),
    ],
)
def test_damaged_metadata_is_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "metadata.csv").write_bytes(content)
    assert part in fault(opened, tmp_path)


def test_faulty_rows_of_a_csv(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "0.png")
    lines = ["file_name,text", "0.png,one", "0.png,one,two", "", "none.png,gone", ",empty", "../out.png,out", "0.png"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    (tmp_path / "out.png").write_bytes(png(0))
    source = opened(folder)
    assert len(source) == 6 and source.captions(0) == ["one"]
    place = f"{folder / 'metadata.csv'}, row"
    assert fault(source.captions, 1) == f"{place} 3: 3 cells under 2 names of columns; quote those with commas"
    assert fault(source.image, 2) == f"{place} 5, 'none.png': 'none.png' is no file"
    assert fault(source.size, 3) == f"{place} 6: no file name under 'file_name' (data.image_column)"
    assert "lies outside the folder" in fault(source.image, 4) and "lies outside" in fault(source.stamp, 4)
    assert "no caption under 'text'" in fault(source.captions, 5)


def test_images_that_metadata_does_not_list_are_named(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "0.png", "sub/1.png", "2.png", "sub/3.JPG", "4.png", ".hidden/5.png")
    rows = [{"file_name": name, "text": "x", "from": "4.png"} for name in ("0.png", "./sub/../sub/1.png", "gone.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nno JSON\n")
    (folder / "notes.txt").write_text("no image")
    paths = [str(folder / name) for name in ("2.png", "4.png", "sub/3.JPG")]
    assert unlisted(opened(folder)) == paths
    assert unlisted(opened(folder, original_image_column="from")) == [paths[0], paths[2]]
    (folder / "metadata.jsonl").unlink()
    assert unlisted(opened(folder, instance_prompt="a toy")) == [] == unlisted(opened("fashion-mnist"))


def test_a_split_where_there_are_none_is_refused(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "cat/0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder / "cat/0.png", "0.png")
    for place in (folder, tmp_path / "a.tar", "fashion-mnist"):
        message = fault(lambda place=place: opened(place, split="test"))
        assert message == f"data.split: {place} has no splits; take it out"
    assert len(opened(folder, split="train")) == 1
    assert "is no folder" in fault(lambda: opened(tmp_path / "none", split="test"))


def test_settings_that_fit_no_folder(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "cat/0.png")
    for key in ("image_column", "caption_column", "label_column", "original_image_column"):
        message = fault(lambda key=key: opened(folder, **{key: "x"}))
        assert message.startswith(f"data.{key}: {folder} has no metadata.jsonl or metadata.csv, so no columns")
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).write_text("{}")
    assert "has both metadata.jsonl and metadata.csv" in fault(opened, folder)
    (tmp_path / "empty").mkdir()
    assert "neither" in fault(opened, tmp_path / "empty")
    assert "is no folder, and no .parquet or .tar file" in fault(opened, tmp_path / "none")
    assert "data.train_data_dir or data.dataset_name" in fault(opened, None)
    assert "data.background" in fault(lambda: opened(folder, background="nocolour"))


def test_grey_and_the_colour_under_transparency(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(tmp_path / "a/a.png")
    assert np.array(opened(tmp_path, background="#0000ff").image(0))[0, 0].tolist() == [0, 0, 255]
    assert opened(tmp_path, 1).image(0).mode == "L"


def test_size_reads_headers_only(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    (tmp_path / "a/0.png").write_bytes(png(0, exif=exif))
    assert opened(tmp_path).image(0).size == (7, 10)
    whole = (tmp_path / "a/0.png").read_bytes()
    (tmp_path / "a/0.png").write_bytes(whole[: whole.index(b"IDAT") + 6])
    assert opened(tmp_path).size(0) == (7, 10) and "cannot be used" in fault(opened(tmp_path).image, 0)


def test_stamps_change_with_the_image_the_caption_and_the_settings(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", "a.png", "b.png")
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    first = opened(folder).stamp(0)
    assert opened(folder).stamp(0) == first and opened(folder).stamp(1) != first
    (folder / "a.txt").write_text("another")
    second = opened(folder).stamp(0)
    (folder / "a.png").write_bytes(png(3))
    os.utime(folder / "a.png", ns=(1, 1))
    third = opened(folder).stamp(0)
    os.utime(folder / "a.png", ns=(1, 2))
    prompted = opened(folder, instance_prompt="x").stamp(0)
    another = opened(folder, instance_prompt="y").stamp(0)
    assert len({first, second, third, opened(folder).stamp(0), prompted, another}) == 6


# ---- tars ----------------------------------------------------------------------------------------------------------


def tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members.items() if isinstance(members, dict) else members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))
    return path


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_tars_of_images_texts_and_json(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tar(
        data / "0.tar",
        {
            "./000.png": png(0),
            "./000.txt": b"\xef\xbb\xbfzero ",
            "./000.json": b'{"kind": 4, "caption": ["nought", "nil"]}',
            "001.JPG": png(1),
            "001.txt": b"one",
            "001.cls": b"7",
            "._001.jpg": b"left behind",
            "dir/001.png": png(2),
            "dir/001.txt": b"another one",
        },
        tarfile.GNU_FORMAT,
    )
    tar(data / "1.tar", {"a" * 150 + ".png": png(3), "a" * 150 + ".txt": "ä".encode()})
    source = opened(data, label_column="kind")
    assert len(source) == 4 and all(shown(source, index) for index in range(4))
    assert [source.captions(index) for index in range(4)] == [["zero"], ["one"], ["another one"], ["ä"]]
    assert source.label(0) == "4" and "no text or whole number" in fault(source.label, 1)
    assert source.name(2) == f"{data / '0.tar'}, sample 'dir/001'"
    assert opened(data, caption_column="caption").captions(0) == ["nought", "nil"]
    assert opened(data, caption_column="caption").captions(1) == ["one"]
    assert opened(data / "1.tar", instance_prompt="x").captions(0) == ["x"]
    assert "data.original_image_column is not set" in fault(source.original, 0)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: shown(source, number % 4), range(200)))


def test_several_images_of_a_sample(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", {"7.before.png": png(1), "7.after.png": png(0), "7.json": b'{"edit": "do it"}'})
    for before, after in (("before", "after"), ("before.png", "after.png")):
        source = opened(path, caption_column="edit", image_column=after, original_image_column=before)
        assert shown(source, 0) and np.array_equal(np.array(source.original(0)), PIXELS[1])
        assert source.captions(0) == ["do it"]
    assert "sample '7': no image, such as .jpg; it has before.*, after.*" in fault(opened(path).image, 0)
    assert "no image 'other'" in fault(opened(path, image_column="other").image, 0)


def test_other_members_of_a_tar_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(5))
    path = tmp_path / "data" / "0.tar"
    tar(path, {"0.png": png(0), "0.txt": b"zero", "0.pkl": pickle.dumps(Bomb(tmp_path / "ran")), "0.pth": b"x"})
    with tarfile.open(path, "a") as file:
        for name, kind, target in (
            ("1.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("2.png", tarfile.LNKTYPE, "../secret.png"),
            ("3.png", tarfile.CHRTYPE, ""),
            ("4.png", tarfile.DIRTYPE, ""),
            ("5.png", tarfile.FIFOTYPE, ""),
        ):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, target
            file.addfile(about)
        for name in ("../../out.png", "/etc/abs.png", "line\nbreak\x1b[2J.png"):
            about = tarfile.TarInfo(name)
            about.size = len(png(1))
            file.addfile(about, io.BytesIO(png(1)))
        about = tarfile.TarInfo("sparse.png")
        about.size, about.pax_headers = 10, {"GNU.sparse.map": "0,5,95,5", "GNU.sparse.size": "100"}
        file.addfile(about, io.BytesIO(b"x" * 10))
    before = sorted(tmp_path.rglob("*"))
    source = opened(path, instance_prompt="x")
    names = [source.name(index) for index in range(len(source))]
    ends = [name.split("sample ")[1] for name in names]
    assert ends == ["'0'", "'../../out'", "'/etc/abs'", r"'line\nbreak\x1b[2J'"]
    assert shown(source, 0) and source.stamp(0) != source.stamp(1)
    assert all(np.array_equal(np.array(source.image(index)), PIXELS[1]) for index in (1, 2, 3))
    assert sorted(tmp_path.rglob("*")) == before


def test_faulty_samples_of_a_tar(tmp_path: Path) -> None:
    members = [
        ("0.png", png(0)),
        ("1.png", b"no picture"),
        ("1.txt", b"\xff\xff"),
        ("2.png", png(2)),
        ("2.json", b"{cut"),
        ("3.png", png(3)),
        ("3.png", png(4)),
        ("3.txt", b"three"),
        ("4.png", png(4)),
        ("4.json", b"[1]"),
        ("5.txt", b"five"),
    ]
    source = opened(tar(tmp_path / "0.tar", members))
    assert "no caption under 'text'" in fault(source.captions, 0)
    assert "cannot be used" in fault(source.image, 1) and "cannot be used" in fault(source.size, 1)
    assert "its .txt member is no UTF-8" in fault(source.captions, 1)
    assert "its .json member is no JSON" in fault(source.captions, 2)
    assert "of which only one can be meant" in fault(source.image, 3)
    assert "its .json member is no JSON object" in fault(source.captions, 4)
    assert source.captions(5) == ["five"] and fault(source.image, 5).endswith("sample '5': no image, such as .jpg")


def test_damaged_tars_are_one_line(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", {f"{number}.png": png(number) for number in range(6)}).read_bytes()
    place = tmp_path / "data" / "0.tar"
    place.parent.mkdir()
    source = None
    damaged = bytearray(whole)
    with tarfile.open(tmp_path / "whole.tar") as file:
        third, last = file.getmembers()[2], file.getmembers()[-1]
    damaged[third.offset + 3] ^= 1  # its checksum is wrong: tarfile alone would stop here and say nothing
    for content, part in (
        (b"", "cannot be read as a tar"),
        (b"no tar" * 200, "cannot be read as a tar"),
        (whole[: last.offset_data + 10], "cut off|unexpected end"),
        (whole[: third.offset + 100], f"damaged at byte {third.offset}"),
        (bytes(damaged), f"damaged at byte {third.offset}"),
        (tar(tmp_path / "empty.tar", {"a.txt": b"a"}).read_bytes(), "no .tar file with images in it"),
    ):
        place.write_bytes(content)
        message = fault(opened, place.parent)
        assert any(one in message for one in part.split("|")), message
        assert str(place.parent) in message
    with tarfile.open(place, "w:gz") as file:
        file.add(tmp_path / "whole.tar", "a.png")
    assert "a tar that is not compressed" in fault(opened, place)
    place.write_bytes(whole)
    source = opened(place)
    stamp = source.stamp(0)
    os.truncate(place, last.offset_data + 10)
    assert "has become shorter" in fault(source.image, 5)
    place.write_bytes(whole)
    os.utime(place, ns=(1, 1))
    assert opened(place).stamp(0) != stamp
    place.unlink()
    assert "cannot be read (No such file" in fault(source.image, 0)


def test_a_folder_of_tars_and_images_is_not_guessed_at(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", {"0.png": png(0)})
    images(tmp_path, "1.png")
    assert "holds images and .tar files" in fault(opened, tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}')
    assert opened(tmp_path).captions(0) == ["one"]


# ---- what comes with the package, or is installed ------------------------------------------------------------------


def test_the_embedded_photographs() -> None:
    source = opened("fashion-mnist", 1)
    assert source.label(0) == "ankle boot" and source.size(0) == source.image(0).size == (28, 28)
    assert len({source.stamp(index) for index in range(50)}) == 50 and source.stamp(3) == source.stamp(3)
    assert "fashion-mnist has no pictures to be changed" in fault(source.original, 0)


def test_the_emoji(tmp_path: Path) -> None:
    folder = images(tmp_path, "1f44b.png", "1f44c.png")
    source: Source = emoji.Emoji((folder / "1f44b.png", folder / "1f44c.png"), ("waving hand sign", "ok hand sign"))
    assert shown(source, 0) and shown(source, 1) and source.stamp(0) != source.stamp(1)
    assert "data.label_column" in fault(source.label, 0) and "data.original_image_column" in fault(source.original, 0)


@pytest.mark.parametrize("name", ["fashion-mnist", "twemoji"])
def test_embedded_sources_take_no_columns_and_no_prompt(name: str) -> None:
    for key in ("image_column", "caption_column", "label_column", "original_image_column"):
        assert f"data.{key}: {name} has no columns" in fault(lambda key=key: opened(name, **{key: "x"}))
    assert "data.instance_prompt" in fault(lambda: opened(name, instance_prompt="x"))
