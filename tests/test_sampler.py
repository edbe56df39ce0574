"""Prompts to pictures with a whole (tiny) model: seeds, batches, guidance, precomputation, and bad input."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

import sampling.guidance
from diffusion_unet.codec import PixelCodec
from diffusion_unet.conditioning import Conditioning, new_text_encoder, train_tokenizer
from diffusion_unet.config import UNetConfig
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError, NonFiniteError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.random import Purpose, normal
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet
from sampling import sample
from sampling.guidance import Guidance, GuidedDenoiser
from sampling.sampler import draw, make_plan
from sampling.solvers import SOLVERS, Table

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


def ancestral(levels: Tensor) -> Table:
    s, after = levels[:-1], levels[1:]
    up = torch.minimum(after, (after**2 * (s**2 - after**2) / s**2).sqrt())
    down = (after**2 - up**2).clamp_min(0).sqrt()
    return Table(s, down / s, (1 - down / s)[:, None], up)


def test_a_seed_is_the_same_picture_with_fresh_noise_too(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOLVERS, "euler_a", ancestral)
    together = pixels(sample(model, PROMPTS[:1], seeds=[1, 2, 3], steps=5, solver="euler_a"))
    alone = pixels(sample(model, PROMPTS[:1], seeds=[3], steps=5, solver="euler_a"))
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
    plan = make_plan(model, PROMPTS[:1], **settings(seeds=[11], steps=10, guidance_scale=2.5, solver=solver))
    actual = draw(model, plan)
    assert actual.dtype == np.uint8 and actual.shape == (1, 8, 8, 1)
    assert np.abs(actual.astype(int) - expected).max() <= 1
    assert expected.std() > 5


def settings(**given: Any) -> dict[str, Any]:
    defaults = {
        "seeds": [0],
        "steps": 3,
        "guidance_scale": 1.0,
        "negative_prompt": "",
        "solver": "ddim",
        "spacing": None,
        "size": None,
        "batch_size": 4,
    }
    return defaults | given


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
    for solver in SOLVERS:
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


class Linear(nn.Module):
    """Counts its rows; answers with its context."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.precomputed: list[list[float]] = []

    def forward(self, x: Tensor, timestep: float, context: Tensor, **inputs: Any) -> Tensor:
        self.rows.append(len(x))
        if "cache" in inputs:
            assert inputs["cache"][0] is context and timestep in inputs["cache"][1]
        return context.mean((1, 2)).reshape(-1, 1, 1, 1).expand_as(x)

    def precompute(self, context: Tensor, timesteps: list[float], **inputs: Any) -> Any:
        self.precomputed.append(timesteps)
        return context, timesteps


def contexts(*values: float) -> Conditioning:
    return Conditioning(context=torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 2, 3))


def test_guidance_runs_both_halves_in_one_batch_or_one_alone() -> None:
    schedule = NoiseSchedule.linear(prediction_type="sample")
    x, levels = torch.zeros(2, 1, 2, 2), [3.0, 1.0, 3.0]
    for scale, rows, expected in ((1.0, 2, [5.0, 7.0]), (4.0, 4, [17.0, 25.0]), (0.0, 4, [1.0, 1.0])):
        unet = Linear()
        guided = GuidedDenoiser(Denoiser(unet, schedule), Guidance(scale), levels, contexts(5, 7), contexts(1, 1))
        for sigma in levels:
            assert guided(x, sigma)[:, 0, 0, 0].tolist() == expected
        assert unet.rows == [rows] * 3
        assert unet.precomputed == [[float(schedule.timestep(sigma)) for sigma in (3.0, 1.0)]]


class OnlyAbove(Guidance):
    """Of the kind that is to come: guidance at some noise levels alone."""

    def needs_both(self, sigma: float) -> bool:
        return sigma > 2


def test_a_plan_may_guide_some_levels_alone() -> None:
    unet = Linear()
    denoiser = Denoiser(unet, NoiseSchedule.linear(prediction_type="sample"))
    guided = GuidedDenoiser(denoiser, OnlyAbove(4.0), [3.0, 1.0], contexts(5, 7), contexts(1, 1))
    x = torch.zeros(2, 1, 2, 2)
    assert guided(x, 3.0)[:, 0, 0, 0].tolist() == [17, 25] and guided(x, 1.0)[:, 0, 0, 0].tolist() == [5, 7]
    assert unet.rows == [4, 2] and sorted(len(timesteps) for timesteps in unet.precomputed) == [1, 1]


def test_each_text_is_encoded_once_and_precomputed_once_a_batch(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[list[str]] = []
    assert model.text is not None
    encode, precompute = model.text.encode, model.unet.precompute
    monkeypatch.setattr(model.text, "encode", lambda texts: encoded.append(list(texts)) or encode(texts))
    calls: list[int] = []
    monkeypatch.setattr(model.unet, "precompute", lambda *a, **k: calls.append(1) or precompute(*a, **k))
    with_cache = pixels(sample(model, PROMPTS, seeds=range(4), steps=3, batch_size=8))
    assert encoded == [[*PROMPTS, ""]] and len(calls) == 1
    monkeypatch.setattr(sampling.guidance.Denoiser, "precompute", lambda *_: None)
    without = pixels(sample(model, PROMPTS, seeds=range(4), steps=3, batch_size=8))
    assert np.abs(with_cache - without).max() <= 1


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
        ({"prompts": ["bag " * 30]}, ["bag", "16"]),
        ({"negative_prompt": "bag " * 30}, ["bag", "16"]),
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
        make_plan(own, PROMPTS, **settings(size=(300, 510)))
    assert make_plan(own, PROMPTS, **settings(size=(304, 512))).shape == (1, 38, 64)


def test_epsilon_with_zero_snr() -> None:
    own = make_model(schedule=NoiseSchedule.linear(zero_snr=True))
    with pytest.raises(InputError, match=r"epsilon.*zero-terminal-SNR"):
        sample(own, PROMPTS)


def test_a_network_that_wants_a_picture_too() -> None:
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=9, out_channels=4))
    own: Any = SimpleNamespace(unet=unet, schedule=NoiseSchedule.linear(), text=None)
    with pytest.raises(InputError, match="9 channels"):
        make_plan(own, None, **settings())
