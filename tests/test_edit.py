"""img2img and inpainting against diffusers' pipelines on tiny models, and what a mask promises of every byte."""

import functools
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from PIL import Image
from torch import Tensor

from diffusion_unet.codec import LatentCodec, PixelCodec
from diffusion_unet.conditioning import Conditioning, TextEncoder
from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet
from sampling.edit import Encoded, Source, source_of, strength_levels
from sampling.solvers import SOLVERS, run, solver_table

# numpy's remark on how diffusers' schedulers turn tensors into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE, LATENT = tiny.SIZE, tiny.SIZE // 2
SCALE = 3.0
HALVES = np.repeat(np.where(np.arange(SIZE) >= SIZE // 2, 255, 0).astype(np.uint8)[None], SIZE, 0)  # right one white


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def made(channels: int = 4) -> tuple[Any, DiffusionModel]:
    """diffusers' U-Net, and a model with one of the same weights."""
    settings = {key: value for key, value in tiny.SD.items() if not key.startswith("_")} | {"in_channels": channels}
    stock = tiny.seeded(functools.partial(diffusers.UNet2DConditionModel, **settings))
    own = UNet(UNetConfig.from_diffusers(settings)).eval()
    own.load_state_dict(stock.state_dict())
    schedule = NoiseSchedule.from_config(dict(tiny.ddim().config))
    text = TextEncoder(tiny.tokenizer(), tiny.text_encoder())
    return stock, DiffusionModel(own, schedule, text, LatentCodec(tiny.vae()))


def pixel_model(channels: int = 3) -> Any:
    """As much of a model on pixels as a source asks for."""
    config = SimpleNamespace(in_channels=channels, out_channels=channels)
    unet = SimpleNamespace(config=config, parameters=lambda: iter([torch.zeros(1)]))
    return SimpleNamespace(unet=unet, codec=PixelCodec(channels, 0.1, 0.6))


def picture(width: int = SIZE, height: int = SIZE, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mean_of(image: np.ndarray) -> Tensor:
    """[1, 4, h, w]: what stock encodes a picture uint8 [H, W, 3] to, without scaling."""
    x = torch.tensor(image).movedim(-1, 0)[None].float() / 127.5 - 1
    with torch.no_grad():
        return tiny.vae().encode(x).latent_dist.mode()


def noise_of(seed: int = 7, pictures: int = 1) -> Tensor:
    return torch.randn((pictures, 4, LATENT, LATENT), generator=torch.Generator().manual_seed(seed))


def no_noise(draw: int) -> Tensor:
    raise AssertionError("a table without noise asked for some")


def drawn(model: DiffusionModel, source: Source | None, steps: int, noise: Tensor, solver: str = "ddim") -> Tensor:
    """Latents, guided, in the order in which a sampler does it."""
    assert source is not None and model.text is not None
    start, levels = source.encode(model), source.levels(model.schedule, steps)
    texts = [start.condition(model.text.encode([text] * len(noise)), len(noise)) for text in (tiny.PROMPT, "")]

    def guided(x: Tensor, sigma: float) -> Tensor:
        conditional, unconditional = (model.denoiser()(x, sigma, text) for text in texts)
        return unconditional + SCALE * (conditional - unconditional)

    with torch.no_grad():
        x = start.begin(noise, float(levels[0]), float(1 / model.schedule.scaling(levels[0]).c_in))
        return run(solver_table(solver, levels, model.schedule), x, start.wrap(guided, noise), no_noise)


def theirs(name: str, stock: Any, **call: Any) -> Tensor:
    """Latents of diffusers' pipeline, from the noise `noise_of()`."""
    pipe = getattr(diffusers, name)(unet=stock, **tiny.text_parts(), **tiny.unchecked())
    pipe.set_progress_bar_config(disable=True)
    given = {"generator": torch.Generator().manual_seed(7), "guidance_scale": SCALE, "output_type": "latent", **call}
    latents: Tensor = pipe(tiny.PROMPT, **given, return_dict=False)[0]
    return latents


def same(ours: Tensor, expected: Tensor) -> bool:
    return ours.shape == expected.shape and bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


# ---- the pipelines of diffusers ----


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 5), (0.3, 3)])
def test_img2img_is_that_of_diffusers(strength: float, steps: int) -> None:
    stock, model = made()
    image = picture()
    ours = drawn(model, source_of(model, image, strength=strength), steps, noise_of())
    latents = mean_of(np.asarray(image)) * 0.18215
    call = {"image": latents, "strength": strength, "num_inference_steps": 10}
    assert same(ours, theirs("StableDiffusionImg2ImgPipeline", stock, **call))
    assert not same(ours, latents)


def test_inpainting_is_that_of_diffusers() -> None:
    stock, model = made()
    image = picture()
    source = source_of(model, image, Image.fromarray(HALVES), strength=0.5)
    ours = drawn(model, source, 5, noise_of())
    latents = mean_of(np.asarray(image)) * 0.18215
    call = {"image": latents, "mask_image": Image.fromarray(HALVES), "masked_image_latents": latents, "height": SIZE,
            "width": SIZE, "strength": 0.5, "num_inference_steps": 10}  # fmt: skip
    assert same(ours, theirs("StableDiffusionInpaintPipeline", stock, **call))
    known = LATENT // 2
    assert same(ours[..., :known], latents[..., :known]) and not same(ours[..., known:], latents[..., known:])


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 4), (0.5, 5)])
def test_an_inpainting_network_is_told_what_diffusers_tells_it(strength: float, steps: int) -> None:
    stock, model = made(9)
    image = picture()
    rest = np.where(HALVES[..., None] > 0, np.uint8(128), np.asarray(image))
    mask = HALVES.copy()
    mask[:, :4] = 127  # darker than half
    given = None if strength == 1 else strength  # the default, where there is a mask
    ours = drawn(model, source_of(model, image, Image.fromarray(mask), strength=given), steps, noise_of())
    call = {"image": mean_of(np.asarray(image)) * 0.18215, "mask_image": Image.fromarray(HALVES), "height": SIZE,
            "width": SIZE, "masked_image_latents": mean_of(rest) * 0.18215, "strength": strength,
            "num_inference_steps": round(steps / strength)}  # fmt: skip
    assert same(ours, theirs("StableDiffusionInpaintPipeline", stock, **call))


def test_instruct_pix2pix_is_guided_by_the_text_as_in_diffusers() -> None:
    stock, model = made(8)
    image = picture()
    ours = drawn(model, source_of(model, image), 4, noise_of())
    call = {"image": mean_of(np.asarray(image)), "image_guidance_scale": 1.0, "num_inference_steps": 4}
    assert same(ours, theirs("StableDiffusionInstructPix2PixPipeline", stock, **call))


# ---- what a mask and a strength promise ----


def toy(x: Tensor, sigma: float) -> Tensor:
    return torch.tanh(x.roll(1, -1) / (1 + sigma)) - 0.3 * x / (1 + sigma)


def fresh(draw: int) -> Tensor:
    return noise_of(100 + draw, 2)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_every_solver_ends_at_the_picture_outside_the_mask(solver: str) -> None:
    mask = torch.zeros(1, 1, LATENT, LATENT)
    mask[..., 3:, 2:6] = 1
    x0, noise = noise_of(1), noise_of(2, 2)
    start = Encoded(0.6, x0, mask, None)
    schedule = NoiseSchedule.scaled_linear()
    levels = strength_levels(schedule, 6, None, 0.6)
    x = run(
        solver_table(solver, levels, schedule), start.begin(noise, float(levels[0]), 1.0), start.wrap(toy, noise), fresh
    )
    outside = (mask == 0).expand_as(x)
    near = 0.02 if solver == "lcm" else 1e-5  # whose last step keeps a little of the noisy x
    assert torch.allclose(x[outside], x0.expand_as(x)[outside], atol=near)
    assert (x - x0)[~outside].abs().mean() > 0.1


def test_a_soft_mask_is_a_blend_of_both() -> None:
    x0, noise, x = noise_of(1), noise_of(2), noise_of(3)
    seen: list[Tensor] = []

    def spy(x: Tensor, sigma: float) -> Tensor:
        seen.append(x)
        return toy(x, sigma)

    answer = Encoded(1.0, x0, torch.full((1, 1, LATENT, LATENT), 0.25), None).wrap(spy, noise)(x, 2.0)
    assert torch.allclose(seen[0], 0.25 * x + 0.75 * (x0 + 2 * noise), atol=1e-6)
    assert torch.allclose(answer, 0.25 * toy(seen[0], 2.0) + 0.75 * x0, atol=1e-6)


def test_bytes_outside_the_mask_are_those_of_the_picture() -> None:
    _, model = made()
    image = picture()
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[3:8, 5:14] = 255  # beside the grid of the latents
    source = source_of(model, image, Image.fromarray(mask))
    assert source is not None and source.strength == 1
    for solver in ("ddim", "dpm++2m"):
        pixels = model.codec.decode(drawn(model, source, 4, noise_of(pictures=2), solver)).numpy()
        done = source.finish(pixels)
        assert done.dtype == np.uint8 and done.shape == (2, SIZE, SIZE, 3)
        assert np.array_equal(done[:, mask == 0], np.broadcast_to(np.asarray(image), done.shape)[:, mask == 0])
        assert np.array_equal(done[:, mask > 0], pixels[:, mask > 0])
        assert not np.array_equal(pixels[:, mask == 0], done[:, mask == 0])  # the autoencoder alone changes them
    held = source.encode(model).mask
    assert held is not None
    touched = mask.reshape(LATENT, 2, LATENT, 2).any(axis=(1, 3))
    assert np.array_equal(held[0, 0].numpy(), touched.astype(np.float32))


def test_grey_of_a_mask_blends_the_bytes() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = picture()
    source = source_of(pixel_model(), image, Image.fromarray(mask))
    assert source is not None
    drawn_anew = np.asarray(picture(seed=1))[None]
    weight = mask[None, ..., None] / 255.0
    exact = weight * drawn_anew + (1 - weight) * np.asarray(image)[None]
    assert np.abs(source.finish(drawn_anew) - exact).max() <= 0.5 + 1e-9


def test_a_picture_without_anything_to_draw_comes_back_byte_for_byte(tmp_path: Path) -> None:
    _, model = made()
    picture().save(tmp_path / "picture.png")
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "mask.png")
    for strength in (None, 0.4):
        source = source_of(model, tmp_path / "picture.png", tmp_path / "mask.png", strength=strength)
        assert source is not None and source.note is None
        done = source.finish(model.codec.decode(drawn(model, source, 3, noise_of())).numpy())
        assert np.array_equal(done[0], np.asarray(picture()))


def test_the_lower_the_strength_the_nearer_the_picture() -> None:
    _, model = made()
    x0 = mean_of(np.asarray(picture())) * 0.18215
    distances = []
    for strength in (0.002, 0.05, 0.4, 0.8):
        ours = drawn(model, source_of(model, picture(), strength=strength), 2, noise_of())
        distances.append(float((ours - x0).square().mean().sqrt()))
    assert distances[0] < 0.1 and distances == sorted(distances) and distances[-1] > 0.5, distances


def test_strength_one_is_drawing_from_noise_alone() -> None:
    _, model = made()
    sources = [source_of(model, picture(seed=seed), strength=1.0) for seed in (0, 1)]
    first, second = (drawn(model, source, 3, noise_of()) for source in sources)
    assert torch.equal(first, second)
    default = source_of(model, picture())
    assert default is not None and default.strength == 0.8


def test_pictures_of_a_batch_and_of_threads_are_those_drawn_alone() -> None:
    _, model = made()
    mask = Image.fromarray(HALVES)
    sources = [source_of(model, picture(), strength=0.6), source_of(model, picture(seed=1), mask, strength=0.6)]
    noise = noise_of(3, 2)
    alone = [[drawn(model, source, 3, noise[i : i + 1]) for i in range(2)] for source in sources]
    together: list[Any] = [None] * 4
    work: list[Callable[[], None]] = []
    for number in range(4):

        def job(number: int = number) -> None:
            together[number] = drawn(model, sources[number % 2], 3, noise[number // 2 : number // 2 + 1])

        work.append(job)
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert torch.equal(together[number], alone[number % 2][number // 2])
    for source, each in zip(sources, alone, strict=True):
        batch = drawn(model, source, 3, noise)
        assert all(same(batch[i : i + 1], each[i]) for i in range(2))


def test_the_picture_goes_beside_every_row_of_the_conditioning() -> None:
    plain = Encoded(1.0, torch.zeros(1), None, None)
    given = Conditioning(context=torch.zeros(3, 2, 4))
    assert plain.condition(given, 3) is given and plain.condition(None, 3) is None
    shown = Encoded(1.0, torch.zeros(1), None, torch.ones(1, 5, 2, 2))
    for conditioning in (shown.condition(given, 3), shown.condition(None, 3)):
        assert conditioning is not None and conditioning.extra is not None and conditioning.extra.shape == (3, 5, 2, 2)


# ---- pictures as they come ----


def test_every_form_of_a_picture_is_the_same_picture(tmp_path: Path) -> None:
    clear = picture(9, 6).convert("RGBA")
    clear.putalpha(Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9) * 4))
    turned = Image.Exif()
    turned[0x0112] = 6
    clear.save(tmp_path / "picture.png", exif=turned)
    content = (tmp_path / "picture.png").read_bytes()
    with Image.open(io.BytesIO(content)) as opened:
        forms = [tmp_path / "picture.png", str(tmp_path / "picture.png"), content, opened]
        sources = [source_of(pixel_model(), form) for form in forms]
    arrays = [source.pixels for source in sources if source is not None]
    assert len(arrays) == 4 and arrays[0].shape == (9, 6, 3)  # upright
    assert all(np.array_equal(arrays[0], other) for other in arrays[1:])
    grey = source_of(pixel_model(1), picture().convert("CMYK"))
    assert grey is not None and grey.pixels.shape == (SIZE, SIZE, 1) and grey.size == (SIZE, SIZE)
    assert torch.equal(grey.encode(pixel_model(1)).x0, PixelCodec(1, 0.1, 0.6).encode(torch.tensor(grey.pixels)[None]))


def test_sizes_are_those_asked_for_or_the_next_below() -> None:
    _, model = made()
    image = picture(19, 15)
    own = source_of(model, image, image.convert("L"))
    assert own is not None and own.mask is not None and own.size == (14, 18) and own.mask.shape == (14, 18)
    assert own.note == "the picture of 19x15 is drawn at 18x14: sides are multiples of 2"
    assert np.array_equal(own.pixels, np.asarray(image)[0:14, 0:18])
    assert np.array_equal(own.mask, np.asarray(image.convert("L"))[0:14, 0:18])
    mask = Image.new("L", (19, 15))
    mask.paste(255, (12, 0, 19, 15))
    asked = source_of(model, image, mask, size=(40, 40))
    assert asked is not None and asked.mask is not None and asked.size == (40, 40) and asked.note is None
    assert set(np.unique(asked.mask)) >= {0, 255} and not asked.mask[:, :20].any() and asked.mask[:, 30:].all()
    one = source_of(model, picture(1, 1))
    assert one is not None and one.size == (2, 2)


def test_what_is_transparent_in_a_mask_is_kept() -> None:
    strokes = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 4, 4))
    source = source_of(pixel_model(), picture(), strokes)
    assert source is not None and source.mask is not None
    assert source.mask[:4, :4].all() and int((source.mask > 0).sum()) == 16


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask": "mask.png"}, ["mask is given, and no picture"]),
        ({"strength": 0.5}, ["strength is given, and no picture"]),
        ({"image": "none.png"}, ["none.png is no file"]),
        ({"image": b"no picture"}, ["the image given cannot be used"]),
        ({"image": picture(), "mask": "none.png"}, ["none.png is no file"]),
        ({"image": picture(), "mask": b""}, ["the mask given cannot be used"]),
        ({"image": 3}, ["image is a int", "path"]),
        ({"image": Image.new("F", (4, 4))}, ["32-bit"]),
        ({"image": picture(), "mask": Image.new("L", (8, 16))}, ["8x16", "16x16", "as large as the picture"]),
        *(({"image": picture(), "strength": bad}, [f"strength is {bad!r}", "at most 1"])
          for bad in (0, -0.5, 1.1, float("nan"), float("inf"), True, "0.5")),
        ({"image": picture(), "size": (0, 16)}, ["16x0"]),
    ],
    ids=lambda value: "-".join(value).replace(" ", "_") if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        source_of(pixel_model(), **given)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_a_truncated_picture_that_was_opened_but_not_read() -> None:
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    with (
        Image.open(io.BytesIO(file.getvalue()[:3000])) as opened,
        pytest.raises(InputError, match="the image given cannot be used"),
    ):
        source_of(pixel_model(), opened)


def test_what_a_network_needs_beside_noise() -> None:
    assert source_of(made()[1]) is None
    for channels, words in ((9, "inpaint needs a picture"), (8, "instruct-pix2pix needs a picture")):
        with pytest.raises(InputError, match=f"takes {channels} channels and predicts 4: {words}"):
            source_of(made(channels)[1])
    with pytest.raises(InputError, match="inpaint needs a mask too"):
        source_of(made(9)[1], picture())
    config = SimpleNamespace(in_channels=7, out_channels=3)
    pixels: Any = SimpleNamespace(unet=SimpleNamespace(config=config), codec=PixelCodec(3))
    with pytest.raises(InputError, match="known for models on latents alone"):
        source_of(pixels, picture(), picture())
    config.in_channels = 5
    with pytest.raises(InputError, match="takes 5 channels and predicts 3: it is neither"):
        source_of(pixels, picture())
