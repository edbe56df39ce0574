"""Pixels against closed forms, hand-made files and Pillow's plain operations."""

import errno
import io
import json
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny_images import chunk, encoded, ink_profile, linear_profile, png, png16, profile, srgb

from diffusion_unet.errors import InputError, SaveError
from diffusion_unet.images import RECORD, grid, image_size, open_image, parameters, save_png, to_array, to_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def opened(data: bytes, channels: int = 3, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    image = open_image(data, channels, background)
    assert image.mode == ("RGB" if channels == 3 else "L")
    return np.array(image)


# ---- what is in the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    height, width = RGB.shape[:2]
    # EXIF 2.32, table 4.6.4: which visual side the 0th row and the 0th column are; here as (y, x) of a stored (r, c).
    place = {
        1: lambda r, c: (r, c),
        2: lambda r, c: (r, width - 1 - c),
        3: lambda r, c: (height - 1 - r, width - 1 - c),
        4: lambda r, c: (height - 1 - r, c),
        5: lambda r, c: (c, r),
        6: lambda r, c: (c, width - 1 - r),
        7: lambda r, c: (height - 1 - c, width - 1 - r),
        8: lambda r, c: (height - 1 - c, r),
    }[orientation]
    shape = (height, width) if orientation < 5 else (width, height)
    stored = np.array([[RGB[place(r, c)] for c in range(shape[1])] for r in range(shape[0])])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    assert np.array_equal(opened(encoded(Image.fromarray(stored), form, exif=exif, **options)), RGB)


def test_a_damaged_exif_block_leaves_the_pixels_alone() -> None:
    assert np.array_equal(opened(encoded(Image.fromarray(RGB), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), RGB)


@pytest.mark.parametrize("columns", ["rgb", "brg"])
def test_icc_profile_is_converted_to_srgb(columns: str) -> None:
    data = encoded(Image.fromarray(RGB), icc_profile=linear_profile(columns))
    expected = srgb(RGB[..., [columns.index(c) for c in "rgb"]] / 255)
    assert np.abs(opened(data) - expected).max() <= 1.5


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_grey_icc_profile_is_converted_to_srgb(form: str, gamma: float) -> None:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    options = {"icc_profile": profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})}
    expected = srgb((GREY / 255) ** gamma)
    assert np.abs(opened(encoded(Image.fromarray(GREY), form, **options), 1) - expected).max() <= 1.5
    assert np.abs(opened(encoded(Image.fromarray(GREY), form, **options)) - expected[..., None]).max() <= 1.5
    clear = encoded(Image.fromarray(np.dstack([GREY, ALPHA])), form, **options)
    weight = ALPHA / 255
    got = opened(clear, 1, background=(40, 40, 40))
    assert np.abs(got - (expected * weight + 40 * (1 - weight))).max() <= 2
    assert np.array_equal(opened(encoded(Image.fromarray(RGB), form, **options)), RGB)  # of other pixels


def blocks() -> np.ndarray:
    """Inks [32, 24, 4], 8 x 8 pixels of each alike, as JPEG keeps them."""
    return RNG.integers(0, 256, (4, 3, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
@pytest.mark.parametrize("profiled", [True, False])
def test_inks_with_and_without_a_profile(form: str, profiled: bool) -> None:
    inks, weights = blocks(), (90, 60, 25, 75)
    options: dict[str, object] = {"icc_profile": ink_profile(weights)} if profiled else {}
    data = encoded(Image.fromarray(inks, "CMYK"), form, **options, **({"quality": 100} if form == "JPEG" else {}))
    if profiled:
        lightness = (255 - inks.astype(float) @ np.array(weights) / 255) / 255 * 100
        # CIE 15:2004, 8.2.1, turned around
        light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness * 27 / 24389)
        expected = srgb(light)[..., None]
    else:
        expected = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    assert np.abs(opened(data) - expected).max() <= 3
    if form == "JPEG":  # Adobe's programs store the complement of each ink, and say that it is theirs
        stored = Image.open(io.BytesIO(data))
        stored.tile = [tile._replace(args=("CMYK", "")) for tile in stored.tile]
        assert b"Adobe" in data and np.abs(np.array(stored).astype(int) - (255 - inks)).max() <= 2


def test_icc_profile_and_transparency_together() -> None:
    clear = np.dstack([RGB, ALPHA])
    plain = opened(encoded(Image.fromarray(RGB), icc_profile=linear_profile("rgb"))).astype(float)
    got = opened(encoded(Image.fromarray(clear), icc_profile=linear_profile("rgb")), background=(10, 20, 30))
    weight = ALPHA[..., None] / 255
    assert np.abs(got - (plain * weight + np.array([10, 20, 30]) * (1 - weight))).max() <= 1


@pytest.mark.parametrize("profile", [b"no profile at all", linear_profile("rgb")[:140]])
def test_a_damaged_icc_profile_is_passed_over(profile: bytes) -> None:
    assert np.array_equal(opened(encoded(Image.fromarray(RGB), icc_profile=profile)), RGB)


def test_an_icc_profile_for_other_pixels_is_passed_over() -> None:
    assert np.array_equal(opened(encoded(Image.fromarray(GREY), icc_profile=linear_profile("rgb")))[..., 0], GREY)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (12, 200, 99)])
def test_alpha_is_composited_over_the_background(background: tuple[int, int, int]) -> None:
    weight = ALPHA[..., None] / 255
    for array in (np.dstack([RGB, ALPHA]), np.dstack([GREY, ALPHA])):
        expected = array[..., :-1] * weight + np.array(background) * (1 - weight)
        got = opened(encoded(Image.fromarray(array)), background=background)
        assert np.abs(got - expected).max() <= 0.5 + 1e-9
        grey = opened(encoded(Image.fromarray(array)), 1, background)
        luma = (expected * np.ones(3)) @ [0.299, 0.587, 0.114]  # ITU-R BT.601
        assert np.abs(grey - luma).max() <= 1


def test_one_colour_declared_transparent() -> None:
    flat = np.array([[[1, 2, 3], [200, 100, 50]]], np.uint8)
    data = png((2, 1, 8, 2), b"\0" + flat.tobytes(), chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert opened(data, background=(9, 8, 7)).tolist() == [[[9, 8, 7], [200, 100, 50]]]
    grey = png((2, 1, 8, 0), b"\0\x05\x06", chunk(b"tRNS", struct.pack(">H", 5)))
    assert opened(grey, background=(9, 8, 7)).tolist() == [[[9, 8, 7], [6, 6, 6]]]
    deep = png16(np.array([[5000, 6000]]), 0, chunk(b"tRNS", struct.pack(">H", 5000)))
    assert opened(deep, background=(9, 8, 7)).tolist() == [[[9, 8, 7], [23, 23, 23]]]
    with pytest.raises(InputError, match="alpha channel"):
        opened(png16(RNG.integers(0, 65536, (1, 2, 3)), 2, chunk(b"tRNS", b"\0\1\0\2\0\3")))


def test_palettes_with_and_without_transparency() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    palette = chunk(b"PLTE", colours.tobytes())
    assert opened(png((3, 1, 8, 3), b"\0\0\1\2", palette)).tolist() == [colours.tolist()]
    clear = chunk(b"tRNS", bytes([255, 0, 51]))  # opaque, clear, a fifth
    assert opened(png((3, 1, 8, 3), b"\0\0\1\2", palette, clear)).tolist() == [
        [[255, 0, 0], [255, 255, 255], [204, 204, 255]]
    ]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.concatenate([RNG.integers(0, 65536, 200), [0, 1, 127, 128, 129, 255, 256, 32767, 65407, 65535]])
    values = values.reshape(14, 15)
    exact = np.floor(values / 257 + 0.5)
    assert np.array_equal(opened(png16(values, 0), 1), exact)
    assert np.array_equal(opened(b"P5 15 14 65535\n" + values.astype(">u2").tobytes(), 1), exact)
    assert np.array_equal(opened(encoded(Image.fromarray(values.astype(np.uint16)), "TIFF"), 1), exact)
    colour = RNG.integers(0, 65536, (4, 5, 3))
    assert np.abs(opened(png16(colour, 2)) - colour / 257).max() < 1
    low = opened(b"P5 2 1 1023\n" + np.array([512, 1023], ">u2").tobytes(), 1)
    assert low.tolist() == [[128, 255]]


def test_pixels_without_an_agreed_white_are_refused() -> None:
    for kind in (np.float32, np.int32):
        with pytest.raises(InputError, match="no agreed white"):
            open_image(encoded(Image.fromarray(np.ones((2, 2), kind)), "TIFF"))


def test_cmyk_grey_and_one_bit() -> None:
    inks = RNG.integers(0, 256, (5, 4, 4), dtype=np.uint8)
    got = opened(encoded(Image.fromarray(inks, "CMYK"), "TIFF"))
    assert np.abs(got - (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255).max() <= 1
    assert np.array_equal(opened(encoded(Image.fromarray(GREY)), 1), GREY)
    assert np.array_equal(opened(encoded(Image.fromarray(GREY))), np.dstack([GREY] * 3))
    bits = GREY > 127
    assert np.array_equal(opened(encoded(Image.fromarray(bits)), 1), bits * 255)


# ---- what cannot be used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "JPEG2000", "BMP"])
def test_truncated_files_are_named(form: str, tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), form)
    for part in range(10):
        path = tmp_path / f"cut {part}.{form.lower()}"
        path.write_bytes(whole[: len(whole) * part // 10])
        with pytest.raises(InputError, match=f"cut {part}.{form.lower()}") as caught:
            open_image(path)
        assert "\n" not in str(caught.value)


def test_bombs_are_refused_before_they_are_unpacked() -> None:
    for side in (12_000, 100_000):  # within, and beyond what Pillow itself lets pass
        with pytest.raises(InputError, match="more than 134217728 pixels"):
            open_image(png((side, side, 8, 2), b""))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * (80 << 20)))
    with pytest.raises(InputError, match="cannot be used"):
        open_image(png((1, 1, 8, 0), b"\0\0", text))


def test_other_things_than_pictures(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    script = tmp_path / "script.png"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    for path, reason in (
        (tmp_path / "none.png", "no file"),
        (tmp_path, "no file"),
        (pipe, "no file"),
        (script, "JPEG"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            open_image(path)
        assert str(path) in str(caught.value)
    with pytest.raises(InputError, match=r"row 7 of data\.parquet cannot be used"):
        open_image(b"", name="row 7 of data.parquet")


def test_animations_are_refused() -> None:
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        with pytest.raises(InputError, match="holds 2 pictures"):
            open_image(encoded(frames[0], form, save_all=True, append_images=frames[1:]))


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "size"), [((40, 90), 16), ((90, 40), (20, 36)), ((7, 7), 32), ((33, 50), (48, 16))])
def test_to_array_is_a_resize_and_then_a_crop(source: tuple[int, int], size: int | tuple[int, int]) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (*source, 3), dtype=np.uint8))
    height, width = (size, size) if isinstance(size, int) else size
    scale = max(height / source[0], width / source[1])
    full = image.resize((round(source[1] * scale), round(source[0] * scale)), Image.Resampling.LANCZOS)
    top, left = round((full.height - height) / 2), round((full.width - width) / 2)
    expected = np.array(full.crop((left, top, left + width, top + height))).astype(int)
    got = to_array(image, size)
    assert got.dtype == np.uint8 and got.shape == (height, width, 3)
    assert np.abs(got - expected).max() <= 1


def test_to_array_keeps_what_fits_and_never_enlarges_what_is_cropped_away() -> None:
    assert np.array_equal(to_array(Image.fromarray(RGB), (6, 9)), RGB)
    assert to_array(Image.fromarray(GREY), 4).shape == (4, 4, 1)
    begun = time.perf_counter()
    strip = to_array(Image.new("L", (1, 30_000), 7), 512)
    assert time.perf_counter() - begun < 1
    assert strip.shape == (512, 512, 1) and (strip == 7).all()
    with pytest.raises(InputError, match="cannot be"):
        to_array(Image.fromarray(RGB), 0)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "PPM"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_image_size_is_that_of_the_upright_picture(
    form: str, orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
    (tmp_path / "a.image").write_bytes(data)
    size = open_image(data).size
    assert size == ((6, 9) if orientation > 4 and form in ("PNG", "JPEG", "WEBP", "TIFF") else (9, 6))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(data) == image_size(tmp_path / "a.image") == size


@pytest.mark.parametrize("kind", ["EXIF", "XMP"])
def test_image_size_heeds_an_orientation_behind_the_pixels(kind: str) -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in RGB)
    exif = Image.Exif()
    exif[0x0112] = 8
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    late = chunk(b"eXIf", exif.tobytes()[6:])
    if kind == "XMP":
        late = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    whole = png((9, 6, 8, 2), rows)
    end = whole.index(b"IEND") - 4
    data = whole[:end] + late + whole[end:]
    assert open_image(data).size == image_size(data) == (6, 9)
    assert image_size(whole[:end] + late[:-6]) == (9, 6)  # damage there turns nothing
    assert image_size(whole) == open_image(whole).size == (9, 6)


def test_image_size_refuses_what_its_header_shows(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(RGB))
    assert image_size(whole[: whole.index(b"IDAT") + 6]) == (9, 6)  # cut within the pixels
    with pytest.raises(InputError, match="more than 134217728 pixels"):
        image_size(png((12_000, 12_000, 8, 2), b""))
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
        with pytest.raises(InputError, match="holds 2 pictures"):
            image_size(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    for source in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match="is no file"):
            image_size(source)
    with pytest.raises(InputError, match=r"^row 7 cannot be used: no AVIF, .* file$"):
        image_size(b"no picture", name="row 7")


def test_to_image_and_back() -> None:
    assert np.array_equal(np.array(to_image(RGB)), RGB)
    assert to_image(GREY[..., None]).mode == "L" and np.array_equal(np.array(to_image(GREY)), GREY)
    for wrong in (RGB.astype(np.float32), RGB[None], np.dstack([RGB, ALPHA])):
        with pytest.raises(InputError, match="no picture"):
            to_image(wrong)


# ---- files out -----------------------------------------------------------------------------------------------------


def test_png_carries_its_record(tmp_path: Path) -> None:
    record = {
        "prompt": 'a "photo", 日本 \ud800\0',
        "negative_prompt": "blur",
        "steps": 20,
        "solver": "dpm++2m",
        "guidance_scale": 4.0,
        "seed": 7,
        "model_hash": "0123456789abcdef",
        "sigmas": [1.5, 0.0],
    }
    save_png(tmp_path / "new" / "a.png", RGB, record)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert np.array_equal(np.array(image), RGB)
        assert json.loads(image.text[RECORD]) == record
        assert image.text["parameters"] == (
            'a "photo", 日本 ? \nNegative prompt: blur\n'
            "Steps: 20, Sampler: DPM++ 2M, CFG scale: 4.0, Seed: 7, Size: 9x6, Model hash: 0123456789"
        )
    save_png(tmp_path / "b.png", to_image(GREY))
    with Image.open(tmp_path / "b.png") as image:
        assert image.text == {} and np.array_equal(np.array(image), GREY)
    assert parameters({"prompt": "x"}, (2, 3)) == "x\nSize: 2x3"


def test_a_png_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "a.png", RGB)
    before = (tmp_path / "a.png").read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=r"a\.png.*No space left"):
        save_png(tmp_path / "a.png", 255 - RGB)
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize("beneath", [True, False])
def test_grid_shows_every_picture_and_its_label(beneath: bool) -> None:
    shades = [30, 90, 150, 210, 60, 120]
    images = [Image.new("L", (16, 16), shade) for shade in shades]
    labels = [f"a photo of a thing number {i}" for i in range(6 if beneath else 2)]
    sheet = np.array(grid(images, labels, columns=3).convert("L"))
    found = []
    for shade in shades:
        ys, xs = np.where(sheet == shade)
        area = sheet[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        block = np.argwhere(area == shade)
        assert len(block) >= 96 * 96  # enlarged, and not written over
        ys, xs = (axis[len(axis) // 2] for axis in (np.sort(ys), np.sort(xs)))
        found.append((ys, xs))
    assert [y for y, _ in found[:3]] == [found[0][0]] * 3 and found[3][0] > found[0][0] + 96
    assert found[0][1] < found[1][1] < found[2][1] and found[0][1] == found[3][1]
    for y, x in found if beneath else found[::3]:
        area = sheet[y + 50 : y + 100, x - 48 : x + 48] if beneath else sheet[y - 40 : y + 40, : x - 50]
        assert (area < 100).sum() > 100  # ink
        assert (area == 255).sum() > area.size / 2


def test_grid_wants_what_it_can_show() -> None:
    images = [Image.new("L", (16, 16))] * 6
    assert grid(images[:1], ["one"], 1).size[0] >= 96
    with_scale = grid(images, ["a", "b"], 3, scale=2)
    assert with_scale.size[0] < grid(images, ["a", "b"], 3).size[0]
    for count, labels, columns in ((6, 4, 3), (0, 0, 3), (6, 6, 0)):
        with pytest.raises(InputError, match="label pictures or rows"):
            grid(images[:count], ["x"] * labels, columns)
    with pytest.raises(InputError, match="one size"):
        grid([*images[:1], Image.new("L", (8, 8))], ["a", "b"], 2)
