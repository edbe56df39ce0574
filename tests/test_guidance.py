"""Guidance: its closed form, diffusers' rescaling and pipeline, and which passes a counting network is asked for."""

import argparse
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from diffusion_unet import arguments
from diffusion_unet.conditioning import Conditioning, TextEncoder
from diffusion_unet.config import UNetConfig
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet
from sampling.guidance import Guidance, GuidedDenoiser
from sampling.texts import Told

ALL: tuple[None, None] = (None, None)
SAMPLE = NoiseSchedule.linear(prediction_type="sample")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Counting(nn.Module):
    """Answers m * (1 + x), or the sine of it, with m the mean of its context; remembers the m of each pass's rows."""

    def __init__(self, curved: bool = False) -> None:
        super().__init__()
        self.curved = curved
        self.asked: list[list[float]] = []

    def forward(self, x: Tensor, timestep: float, context: Tensor, **inputs: Any) -> Tensor:
        means = context.mean((1, 2)).to(x.dtype)
        self.asked.append(means.tolist())
        answer = means.reshape(-1, 1, 1, 1) * (1 + x)
        return answer.sin() if self.curved else answer


def contexts(*means: float) -> Conditioning:
    return Conditioning(context=torch.tensor(means, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 2, 3))


def told(*means: float) -> Told:
    return Told(contexts(*means))


def noisy(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- what is answered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "rescale", "means"),
    [
        (1, 0.0, [5, 7]),
        (4, 0.0, [17, 25]),
        (0.0, 0.0, [1, 1]),
        (-1.0, 0.0, [-3, -5]),
        (1.0, 1.0, [5, 7]),
        (4.0, 1.0, [5, 7]),  # all of the deviation is the conditional answer's again, in each picture
        (4.0, 0.5, [11, 16]),
        (0.0, 1, [5, 7]),
    ],
)
def test_guidance_is_its_formula(scale: float, rescale: float, means: list[float]) -> None:
    unet, x = Counting(), noisy(2, 1, 3, 3)
    guidance = Guidance(scale, rescale)
    guided = GuidedDenoiser(Denoiser(unet, SAMPLE), guidance, [3.0, 1.0], told(5, 7), told(1, 1))
    for sigma in (3.0, 1.0, 3.0):
        expected = torch.tensor(means).reshape(-1, 1, 1, 1) * (1 + x / math.sqrt(1 + sigma**2))
        torch.testing.assert_close(guided(x, sigma), expected, rtol=1e-12, atol=1e-12)


SCHEDULES = {
    "epsilon": NoiseSchedule.scaled_linear(),
    "sample": SAMPLE,
    "v": NoiseSchedule.cosine(prediction_type="v_prediction"),
    "zero-snr": NoiseSchedule.scaled_linear(prediction_type="v_prediction", zero_snr=True),
    "flow": NoiseSchedule.flow(shift=2.0),
    "edm": NoiseSchedule.edm(),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_rescaling_is_diffusers_of_the_networks_output(kind: str) -> None:
    schedule = SCHEDULES[kind]
    denoiser = Denoiser(Counting(curved=True), schedule)
    both = contexts(5, 7), contexts(1, 2)
    guided = GuidedDenoiser(denoiser, Guidance(6.0, 0.7), [8.0, 1.0, 0.05], *map(Told, both))
    for sigma in (8.0, 1.0, 0.05):
        x = sigma * noisy(2, 4, 5, 6)
        towards, away = (denoiser.predict(x, sigma, half) for half in both)
        output = rescale_noise_cfg(away + 6.0 * (towards - away), towards, 0.7)
        _, c_skip, c_out, _ = schedule.scaling(sigma)
        expected = c_skip * x + c_out * output
        torch.testing.assert_close(guided(x, sigma), expected, rtol=1e-10, atol=1e-10)
        single = guided(x.float(), sigma)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)
        assert (expected - (c_skip * x + c_out * (away + 6.0 * (towards - away)))).abs().max() > 0.01 * c_out.abs()


# ---- which passes are run ------------------------------------------------------------------------------------------

LEVELS = (10.0, 5.42, 3.0, 0.28, 0.1)


@pytest.mark.parametrize(
    ("scale", "interval", "passes"),
    [
        (4.0, (0.28, 5.42), [1, 2, 2, 1, 1]),  # the upper end is within, the lower is not
        (4.0, (None, 5.42), [1, 2, 2, 2, 2]),
        (4.0, (0.28, None), [2, 2, 2, 1, 1]),
        (4.0, (0, 1000), [2, 2, 2, 2, 2]),
        (4.0, ALL, [2, 2, 2, 2, 2]),
        (4.0, (3.5, 4.5), [1, 1, 1, 1, 1]),
        (1.0, ALL, [1, 1, 1, 1, 1]),
        (1, (0.28, 5.42), [1, 1, 1, 1, 1]),
        (0.0, ALL, [2, 2, 2, 2, 2]),
    ],
)
@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_the_passes_are_those_that_were_planned(
    scale: float, interval: tuple[float | None, float | None], passes: list[int], rescale: float
) -> None:
    unet, x = Counting(), noisy(2, 1, 3, 3)
    guidance = Guidance(scale, rescale, interval)
    guided = GuidedDenoiser(Denoiser(unet, SAMPLE), guidance, LEVELS, told(5, 7), told(1, 1))
    assert guided.passes == dict(zip(LEVELS, passes, strict=True))
    assert [guidance.passes(sigma) for sigma in LEVELS] == passes and not unet.asked
    answers = [guided(x, sigma) for sigma in LEVELS]
    assert unet.asked == [[5, 7, 1, 1] if count == 2 else [5, 7] for count in passes]
    full = 1 + scale * 4 if not rescale else 5
    for sigma, count, answer in zip(LEVELS, passes, answers, strict=True):
        expected = (full if count == 2 else 5) * (1 + x[0] / math.sqrt(1 + sigma**2))
        torch.testing.assert_close(answer[0], expected, rtol=1e-12, atol=1e-12)


def test_what_has_no_second_half_is_run_once() -> None:
    for conditional in (told(5, 7), Told(None)):
        unet = Counting() if conditional.conditioning else nn.Identity()
        if conditional.conditioning is None:
            unet.forward = lambda x, timestep, context, **inputs: x  # type: ignore[method-assign]
        guided = GuidedDenoiser(Denoiser(unet, SAMPLE), Guidance(4.0, 0.7), [1.0], conditional)
        assert guided.passes == {1.0: 1} and guided(noisy(2, 1, 3, 3), 1.0).shape == (2, 1, 3, 3)


# ---- a whole picture -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("rescale", "guided_steps"), [(0.7, 4), (0.0, 2), (1.0, 2)])
def test_a_picture_is_the_stock_pipelines(rescale: float, guided_steps: int) -> None:
    """Guidance that ends on the way is done there by a callback, which turns it off."""
    settings = {key: value for key, value in tiny.SD.items() if not key.startswith("_")}
    stock = tiny.seeded(functools.partial(diffusers.UNet2DConditionModel, **settings))
    unet = UNet(UNetConfig.from_diffusers(tiny.SD)).eval()
    unet.load_state_dict(stock.state_dict())
    pipe, noise = tiny.sd("StableDiffusionPipeline").assemble(stock), tiny.vectors(3, 1, 4, 8, 8)

    def switch(pipe: Any, index: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
        if index == guided_steps - 1:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    call = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent", "return_dict": False}
    size = {"height": tiny.SIZE, "width": tiny.SIZE}
    drawn = pipe(
        tiny.PROMPT, negative_prompt=tiny.OTHER_PROMPT, guidance_rescale=rescale, latents=noise,
        callback_on_step_end=switch, callback_on_step_end_tensor_inputs=["prompt_embeds"], **call, **size,
    )[0]  # fmt: skip

    schedule = NoiseSchedule.from_config(dict(tiny.ddim().config))
    levels = [float(schedule.sigma(t)) for t in pipe.scheduler.timesteps] + [0.0]
    guidance = Guidance(5.0, rescale, (levels[guided_steps], None))
    with torch.no_grad():
        texts = TextEncoder(tiny.tokenizer(), tiny.text_encoder()).encode([tiny.PROMPT, tiny.OTHER_PROMPT])
        guided = GuidedDenoiser(Denoiser(unet, schedule), guidance, levels[:-1], Told(texts[:1]), Told(texts[1:]))
        x = math.sqrt(1 + levels[0] ** 2) * noise
        for sigma, after in itertools.pairwise(levels):
            clean = guided(x, sigma)
            x = clean + after / sigma * (x - clean)
    assert list(guided.passes.values()) == [2] * guided_steps + [1] * (4 - guided_steps)
    torch.testing.assert_close(x, drawn, rtol=1e-4, atol=1e-4 * float(drawn.std()))


# ---- what is refused -----------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(({"scale": value}, "guidance_scale is ") for value in (NAN, INF, -INF, "4", None, True, 10**400)),
        *(({"rescale": value}, "guidance_rescale is ") for value in (NAN, INF, -0.1, 1.1, "0.7", None, True)),
        *(({"interval": value}, "interval is ") for value in ((5.42, 0.28), (1.0, 1.0), (0, 0), (None, 0.0))),
        *(({"interval": value}, "interval is ") for value in ((-1.0, 1.0), (None, -1.0), (NAN, 1.0), (0.0, NAN))),
        *(({"interval": value}, "interval is ") for value in ((0.0, INF), ("0", "1"), (1.0,), (0.0, 1.0, 2.0))),
        *(({"interval": value}, "interval is ") for value in (None, 1.0, "12", (True, 2.0))),
    ],
)
def test_bad_settings_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Guidance(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("0.28:5.42", (0.28, 5.42)),
        (":5.42", (None, 5.42)),
        ("0.28:", (0.28, None)),
        (":", ALL),
        ("0:1e3", (0, 1000)),
    ],
)
def test_an_interval_is_read(text: str, interval: tuple[float | None, float | None]) -> None:
    assert arguments.interval(text) == interval
    Guidance(4.0, interval=interval)


@pytest.mark.parametrize("text", ["5.42:0.28", "1:1", "-1:2", ":-1", ":0", "", "3", "nan:1", "0:inf", "a:b", "1:2:3"])
def test_a_text_that_is_no_interval(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.interval(text)
