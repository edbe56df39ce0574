"""Prompts to pictures with a whole (tiny) model: seeds, batches, guidance, precomputation, and bad input."""

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from diffusion_unet.codec import PixelCodec
from diffusion_unet.conditioning import new_text_encoder, train_tokenizer
from diffusion_unet.config import UNetConfig
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError, NonFiniteError
from diffusion_unet.images import save_png
from diffusion_unet.model import DiffusionModel
from diffusion_unet.random import Purpose, normal
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet
from sampling import sample
from sampling.replay import replay
from sampling.request import Request
from sampling.sampler import draw, make_plan
from sampling.solvers import SOLVERS

PROMPTS = ["a photo of a bag", "a coat"]
V = "v_prediction"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(text: bool = True, channels: int = 1, schedule: NoiseSchedule | None = None) -> DiffusionModel:
    torch.manual_seed(0)
    cross = {"cross_attention_dim": 12} if text else {"cross_attention_dim": None}
    config = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D" if text else "DownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if text else "UNetMidBlock2D",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D" if text else "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    }
    unet = UNet(UNetConfig.from_diffusers({**config, **cross})).eval()
    encoder = None
    if text:
        tokenizer = train_tokenizer(PROMPTS, 520, 16)
        encoder = new_text_encoder(tokenizer, hidden_size=12, num_hidden_layers=1, num_attention_heads=2).eval()
    schedule = schedule or NoiseSchedule.scaled_linear(prediction_type=V)
    return DiffusionModel(unet, schedule, encoder, PixelCodec(channels, 0.0, 0.5))


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return make_model()


def pixels(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


# ---- what is drawn ----


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m"])
def test_a_seed_is_the_same_picture_in_every_batch(model: DiffusionModel, solver: str) -> None:
    seeds = [5, 0, 2**64 - 1, 7, 8]
    options: dict[str, Any] = {"steps": 4, "solver": solver, "guidance_scale": 3.0}
    together = pixels(sample(model, PROMPTS, seeds=seeds, batch_size=16, **options))
    assert together.shape == (10, 8, 8) and len({picture.tobytes() for picture in together}) == 10
    for batch_size in (1, 3):
        assert (
            np.abs(pixels(sample(model, PROMPTS, seeds=seeds, batch_size=batch_size, **options)) - together).max() <= 1
        )
    alone = pixels(sample(model, PROMPTS[1], seeds=[7], **options))
    assert np.abs(alone[0] - together[5 + 3]).max() <= 1  # prompt-major: all of the first prompt first


def test_pairs_are_those_of_all_with_all(model: DiffusionModel) -> None:
    every = pixels(sample(model, PROMPTS, seeds=[3, 4], steps=2))
    pairs = pixels(sample(model, [PROMPTS[1], *PROMPTS], seeds=[3, 4, 4], steps=2, paired=True))
    assert np.abs(pairs - every[[2, 1, 3]]).max() <= 1


def test_each_picture_is_told_once_its_batch_is_drawn(model: DiffusionModel) -> None:
    seen: list[Any] = []
    model.unet.train()

    def look(image: Any) -> None:
        assert model.unet.training and not torch.is_inference_mode_enabled()
        seen.append(image)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, PROMPTS, seeds=range(3), steps=1, batch_size=2, finished=look)
    assert model.unet.training
    model.unet.eval()
    assert np.array_equal(pixels(seen), pixels(sample(model, PROMPTS, seeds=range(3), steps=1, batch_size=2)[:4]))


@pytest.mark.parametrize(
    "solver", ["euler_a", "dpm++2m_sde", "lcm", DDPMScheduler()], ids=["euler_a", "sde", "lcm", "wrapped"]
)
def test_a_picture_with_noise_on_its_way_depends_on_its_own_seed_alone(model: DiffusionModel, solver: Any) -> None:
    together = pixels(sample(model, PROMPTS[:1], seeds=[1, 2, 3], steps=5, solver=solver))
    alone = pixels(sample(model, PROMPTS[:1], seeds=[3], steps=5, solver=solver))
    assert np.abs(together[2] - alone[0]).max() <= 1
    assert np.abs(together[2] - pixels(sample(model, PROMPTS[:1], seeds=[3], steps=5))[0]).max() > 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("solver", ["ddim", "dpm++2m"])
def test_the_picture_is_that_of_diffusers_own_loop(model: DiffusionModel, solver: str) -> None:
    """Scheduler, guidance and conditioning written out as a stock pipeline does, from the same noise."""
    config = model.schedule.to_config()
    if solver == "ddim":
        scheduler: Any = DDIMScheduler.from_config(config)
    else:
        keys = set(DPMSolverMultistepScheduler().config)
        scheduler = DPMSolverMultistepScheduler.from_config({k: v for k, v in config.items() if k in keys})
    assert model.text is not None
    scheduler.set_timesteps(10)
    with torch.no_grad():
        context = model.text.encode(["", PROMPTS[0]]).context
        x = normal(11, Purpose.PICTURE, 0, (1, 8, 8))
        for t in scheduler.timesteps:
            unconditional, conditional = model.unet(torch.cat([x, x]), t, context).chunk(2)
            x = scheduler.step(unconditional + 2.5 * (conditional - unconditional), t, x).prev_sample
    expected = model.codec.decode(x).numpy()
    plan = make_plan(model, Request(prompts=PROMPTS[:1], seeds=[11], steps=10, guidance_scale=2.5, solver=solver))
    actual = draw(model, plan)
    assert actual.dtype == np.uint8 and actual.shape == (1, 8, 8, 1)
    assert np.abs(actual.astype(int) - expected).max() <= 1
    assert expected.std() > 5


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.flow(shift=2.0),
        NoiseSchedule.edm(),
        NoiseSchedule.cosine(prediction_type=V, zero_snr=True),
        NoiseSchedule.linear(prediction_type="sample", zero_snr=True),
    ],
    ids=lambda s: s.prediction_type,
)
def test_every_kind_of_schedule_draws(schedule: NoiseSchedule) -> None:
    own = make_model(schedule=schedule)
    for solver in SOLVERS if schedule.table is not None else set(SOLVERS) - {"lcm"}:
        pictures = pixels(sample(own, PROMPTS, seeds=[0, 1], steps=6, solver=solver, guidance_scale=2.0))
        assert pictures.shape == (4, 8, 8) and pictures.std() > 1


def test_sizes_channels_and_modes(model: DiffusionModel) -> None:
    grey = sample(model, PROMPTS[0], steps=2, size=(6, 11))[0]
    assert grey.mode == "L" and grey.size == (11, 6)
    colour = sample(make_model(channels=3), PROMPTS[0], steps=2, guidance_scale=1)[0]
    assert colour.mode == "RGB" and colour.size == (8, 8)


def test_a_model_without_text_draws_one_picture_a_seed() -> None:
    own = make_model(text=False)
    for prompts in (None, []):
        images = sample(own, prompts, seeds=[0, 1, 2], steps=2)
        assert len(images) == 3
    assert np.array_equal(pixels(images), pixels(sample(own, seeds=[0, 1, 2], steps=2, guidance_scale=1.0)))
    with pytest.raises(InputError, match="no text encoder"):
        sample(own, ["a bag"])


def test_progress_and_training_flags(model: DiffusionModel) -> None:
    own = make_model()
    own.unet.train()
    own.unet.conv_in.eval()
    before = [module.training for module in own.unet.modules()]
    seen: list[tuple[int, int]] = []
    watched: list[bool] = []
    own.unet.conv_in.register_forward_hook(lambda *_: watched.append(own.unet.training))
    sample(own, PROMPTS, seeds=[0, 1], steps=3, batch_size=3, progress=lambda *step: seen.append(step))
    assert seen == [(i, 6) for i in range(1, 7)]
    assert not any(watched) and [module.training for module in own.unet.modules()] == before
    assert all(parameter.grad is None for parameter in own.unet.parameters())
    with pytest.raises(KeyboardInterrupt):
        sample(own, PROMPTS, progress=interrupt)
    assert [module.training for module in own.unet.modules()] == before


def interrupt(step: int, total: int) -> None:
    raise KeyboardInterrupt


def test_numbers_that_are_not_finite(model: DiffusionModel) -> None:
    own = make_model()
    nn.init.constant_(own.unet.conv_out.bias, float("nan"))
    with pytest.raises(NonFiniteError):
        sample(own, PROMPTS, steps=1)


# ---- guidance ----


def test_each_text_is_encoded_and_precomputed_once(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    calls: list[Any] = []
    assert model.text is not None
    encode, precompute = model.text.encode, model.unet.precompute
    monkeypatch.setattr(
        model.text, "encode", lambda texts, chunks: encoded.extend(texts) or encode(texts, chunks=chunks)
    )
    monkeypatch.setattr(model.unet, "precompute", lambda *a, **k: calls.append(a[0]) or precompute(*a, **k))
    with_cache = pixels(sample(model, [*PROMPTS, PROMPTS[0]], seeds=range(4), steps=3, batch_size=3))
    assert encoded == [PROMPTS[0], "", PROMPTS[1]] and len(calls) == 3
    monkeypatch.setattr(Denoiser, "precompute", lambda *_: None)
    without = pixels(sample(model, [*PROMPTS, PROMPTS[0]], seeds=range(4), steps=3, batch_size=3))
    assert np.abs(with_cache - without).max() <= 1


@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc", "dpm++2m_sde"])
def test_exact_pictures_are_those_that_their_seeds_give_alone_to_the_bit(model: DiffusionModel, solver: str) -> None:
    """Whatever is drawn beside them: other prompts, longer ones, in any order."""
    long = "a photo of a bag " * 9
    options: dict[str, Any] = {"steps": 4, "solver": solver, "exact": True}
    together = pixels(sample(model, [PROMPTS[0], long, PROMPTS[1]], seeds=[5, 6], **options))
    for place, (prompt, seed) in enumerate(
        (prompt, seed) for prompt in (PROMPTS[0], long, PROMPTS[1]) for seed in (5, 6)
    ):
        assert np.array_equal(pixels(sample(model, prompt, seeds=[seed], **options))[0], together[place])


def test_many_threads_draw_what_each_would_draw_alone(model: DiffusionModel) -> None:
    requests: list[dict[str, Any]] = [
        {"prompts": PROMPTS[number % 2], "seeds": [number, 9], "steps": 3 + number % 3, "solver": solver}
        | {"guidance_scale": 1.0 + number, "size": (8, 8 + number % 2), "rng": rng}
        for number, (solver, rng) in enumerate(
            itertools.product(("ddim", "heun", "euler_a", "unipc", DDPMScheduler()), ("philox", "torch"))
        )
    ]
    alone = [pixels(sample(model, **request)) for request in requests]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: pixels(sample(model, **request)), requests * 2))
    for expected, given in zip(alone * 2, together, strict=True):
        assert np.array_equal(expected, given)


def test_what_the_network_expects_is_watched_step_by_step(model: DiffusionModel) -> None:
    seen: list[tuple[int, np.ndarray]] = []
    images = sample(model, PROMPTS, seeds=[0, 1, 2], steps=3, batch_size=4, watch=lambda *given: seen.append(given))
    assert [(first, len(frames)) for first, frames in seen] == [(0, 4)] * 3 + [(4, 2)] * 3
    assert np.array_equal(seen[5][1][1, :, :, 0], pixels(images)[5])  # the last answer is the picture
    assert np.abs(seen[3][1].astype(int) - seen[5][1]).max() > 1


def test_a_picture_carries_its_record_and_a_file_of_it_too(model: DiffusionModel, tmp_path: Path) -> None:
    """And drawn again from it, it is the same to the bit."""
    model.save(tmp_path / "model")
    for number, given in enumerate(
        [
            {"solver": "DPM++ 2M SDE Karras", "guidance_rescale": 0.5, "interval": (0.1, 9.0), "rng": "nv"},
            {"sigmas": [10.0, 3.0, 0.5], "solver": "ddim", "eta": 0.5, "variation_seed": 4, "variation_strength": 0.3},
            {"image": tmp_path / "0.png", "strength": 0.6, "exact": True, "negative_prompt": "a bag"},
            {"image": tmp_path / "0.png", "mask": tmp_path / "1.png", "steps": 5, "solver": "heun"},
        ]
    ):
        images = sample(model, PROMPTS[1], seeds=[3], model_name=str(tmp_path / "model"), **given)
        save_png(tmp_path / f"{number}.png", images[0])
        record = json.loads(images[0].info["diffusion_unet"])
        assert record["seed"] == 3 and record["prompt"] == PROMPTS[1] and record["model_hash"] == model.fingerprint()
        assert images[0].info["parameters"].startswith("a coat\n")
        again = replay(tmp_path / f"{number}.png")
        assert again.largest == 0 and again.differences == (), (given, str(again))


def test_a_negative_prompt_for_each_prompt(model: DiffusionModel) -> None:
    each = pixels(sample(model, PROMPTS, steps=3, negative_prompt=["a coat", ""], exact=True))
    for place, negative in enumerate(("a coat", "")):
        alone = pixels(sample(model, PROMPTS[place], steps=3, negative_prompt=negative, exact=True))
        assert np.array_equal(each[place], alone[0])


def test_the_negative_prompt_matters_and_scale_1_ignores_it(model: DiffusionModel) -> None:
    def drawn(**given: Any) -> np.ndarray:
        return pixels(sample(model, PROMPTS[0], steps=4, **given))

    assert not np.array_equal(drawn(guidance_scale=9.0), drawn(guidance_scale=9.0, negative_prompt="a coat"))
    assert np.array_equal(drawn(guidance_scale=1.0), drawn(guidance_scale=1.0, negative_prompt="a coat"))


# ---- bad input ----


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"solver": "euler++"}, ["euler++", "dpm++2m", "ddim"]),
        ({"steps": 0}, ["steps is 0"]),
        ({"steps": 5000}, ["steps is 5000"]),
        ({"steps": 10**12, "spacing": "karras"}, ["10000"]),
        ({"spacing": "bunched"}, ["bunched", "karras"]),
        ({"guidance_scale": float("nan")}, ["guidance_scale is nan"]),
        ({"guidance_scale": float("-inf")}, ["guidance_scale is -inf"]),
        ({"guidance_scale": "4"}, ["guidance_scale is '4'"]),
        ({"seeds": [-1]}, ["seed -1"]),
        ({"seeds": [0, 2**64]}, ["seed 18446744073709551616"]),
        ({"seeds": [1.5]}, ["seed 1.5"]),
        ({"seeds": [True]}, ["seed True"]),
        ({"seeds": []}, ["no seed"]),
        ({"size": (0, 8)}, ["8x0", "8x1"]),
        ({"size": (8, -8)}, ["-8x8"]),
        ({"size": (8, 10**12)}, ["16384"]),
        ({"paired": True, "seeds": [1, 2, 3]}, ["2 prompts", "3 seeds"]),
        ({"size": (8.0, 8)}, ["size (8.0, 8)"]),
        ({"batch_size": 0}, ["batch_size is 0"]),
        ({"prompts": []}, ["no prompt"]),
        ({"prompts": None}, ["no prompt"]),
        ({"prompts": [3]}, ["prompt 3"]),
        ({"prompts": ["bag " * 3000]}, ["bag", "32 chunks"]),
        ({"negative_prompt": "bag " * 3000}, ["bag", "32 chunks"]),
        ({"negative_prompt": ["a", "b", "c"]}, ["3 negative prompts and 2 prompts"]),
        ({"negative_prompt": 3}, ["negative_prompt is 3"]),
        ({"sigmas": [1.0, 2.0]}, ["sigmas: number 2 is 2"]),
        ({"sigmas": [1.0], "spacing": "karras"}, ["sigmas and spacing"]),
        ({"interval": (5.42, 0.28)}, ["interval is (5.42, 0.28)"]),
        ({"guidance_rescale": 2}, ["guidance_rescale is 2"]),
        ({"rng": "dice"}, ["rng 'dice'", "philox, torch, nv"]),
        ({"variation_strength": 0.5}, ["variation_seed"]),
        ({"eta": 0.5}, ["dpm++2m has no eta"]),
        ({"tile": 64}, ["tile", "no autoencoder"]),
        ({"mask": b"."}, ["mask is given, and no picture"]),
        ({"solver": DDIMScheduler(), "spacing": "karras"}, ["a scheduler sets its own"]),
    ],
)
def test_bad_input(model: DiffusionModel, given: dict[str, Any], words: list[str]) -> None:
    prompts = given.pop("prompts", PROMPTS)
    with pytest.raises(InputError) as error:
        sample(model, prompts, **given)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_size_of_a_latent_model_names_the_nearest(model: DiffusionModel) -> None:
    codec = SimpleNamespace(scale_factor=8)
    own: Any = SimpleNamespace(unet=model.unet, schedule=model.schedule, text=model.text, codec=codec)
    with pytest.raises(InputError, match=r"510x300 cannot be drawn.* 512x304"):
        make_plan(own, Request(prompts=PROMPTS, size=(300, 510)))
    assert make_plan(own, Request(prompts=PROMPTS, size=(304, 512))).shape == (1, 38, 64)


def test_epsilon_with_zero_snr() -> None:
    own = make_model(schedule=NoiseSchedule.linear(zero_snr=True))
    with pytest.raises(InputError, match=r"epsilon.*zero-terminal-SNR"):
        sample(own, PROMPTS)


def test_a_network_that_wants_a_picture_too() -> None:
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=9, out_channels=4))
    own: Any = SimpleNamespace(unet=unet, schedule=NoiseSchedule.linear(), text=None)
    with pytest.raises(InputError, match="9 channels"):
        make_plan(own, Request())
