"""The diffusers pipeline beside this project's own sampling, with the noise that both are given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

from diffusion_unet import sample
from diffusion_unet.codec import PixelCodec
from diffusion_unet.conditioning import new_text_encoder, train_tokenizer
from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.pipeline import PixelTextToImagePipeline
from diffusion_unet.random import Purpose, normal
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet

# what some schedulers of diffusers set off in numpy 2
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
PROMPTS = ["a photo of a sneaker", "a sandal"]


def tiny(**changes: object) -> UNet:
    torch.manual_seed(0)
    down = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "block_out_channels": [32, 64]}
    up = {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 8}
    sizes = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "cross_attention_dim": 32, "attention_head_dim": 2}
    return UNet(UNetConfig.from_diffusers(down | up | sizes | changes)).eval()


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    tokenizer = train_tokenizer(PROMPTS, 560, 12)
    text = new_text_encoder(tokenizer, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).eval()
    schedule = NoiseSchedule.cosine(prediction_type="v_prediction")
    return DiffusionModel(tiny(), schedule, text, PixelCodec(3, -0.2, 0.6))


def quiet(folder: Path) -> PixelTextToImagePipeline:
    pipe = PixelTextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> PixelTextToImagePipeline:
    return quiet(model.save(tmp_path_factory.mktemp("out") / "model"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(pipe: PixelTextToImagePipeline, *args: object, **options: object) -> np.ndarray:
    images = pipe(*args, **{"num_inference_steps": 3, "output_type": "np"} | options).images
    assert images.dtype == np.uint8
    return images.astype(int)


@NUMPY
@pytest.mark.parametrize(
    ("schedule", "guidance_scale"), [("v_prediction", 3.0), ("epsilon", 1.0), ("sample", 3.0), ("flow", 3.0)]
)
def test_pictures_are_those_of_our_own_sampling(
    model: DiffusionModel, tmp_path: Path, schedule: str, guidance_scale: float
) -> None:
    kind = NoiseSchedule.flow() if schedule == "flow" else NoiseSchedule.scaled_linear(prediction_type=schedule)
    other = DiffusionModel(model.unet, kind, model.text, model.codec)
    pipe = quiet(other.save(tmp_path / "model"))
    assert isinstance(pipe.unet, UNet2DConditionModel) and pipe.config.pixel_mean == -0.2
    solver = "dpm++2m" if schedule == "flow" else "ddim"
    settings = {"negative_prompt": "a coat", "guidance_scale": guidance_scale}
    ours = sample(other, PROMPTS, seeds=[5], steps=5, solver=solver, **settings)
    noise = normal(5, Purpose.PICTURE, 0, (3, 16, 16)).expand(2, -1, -1, -1)
    theirs = drawn(pipe, PROMPTS, num_inference_steps=5, latents=noise, **settings)
    assert theirs.shape == (2, 16, 16, 3)
    assert np.abs(theirs - np.stack([np.array(image) for image in ours]).astype(int)).max() <= 1
    assert np.ptp(theirs) > 50


@NUMPY
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers(
    model: DiffusionModel, pipe: PixelTextToImagePipeline, scheduler: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))
    first = drawn(pipe, PROMPTS[0], generator=seeded())
    assert np.array_equal(drawn(pipe, PROMPTS[0], generator=seeded()), first)
    assert not np.array_equal(drawn(pipe, PROMPTS[0], generator=seeded(1)), first)


def test_guidance_is_its_formula(pipe: PixelTextToImagePipeline) -> None:
    """One step of v-prediction is linear in the network's output, and so is the picture where nothing is clamped."""
    noise = torch.randn(1, 3, 16, 16, generator=seeded())
    away = drawn(pipe, "a coat", num_inference_steps=1, latents=noise, guidance_scale=1.0)
    towards = drawn(pipe, PROMPTS[0], num_inference_steps=1, latents=noise, guidance_scale=1.0)
    both = drawn(pipe, PROMPTS[0], negative_prompt="a coat", num_inference_steps=1, latents=noise, guidance_scale=5.0)
    inside = (towards > 0) & (towards < 255) & (away > 0) & (away < 255) & (both > 0) & (both < 255)
    assert inside.mean() > 0.5
    assert np.abs(both - (away + 5 * (towards - away)))[inside].max() <= 5  # each of the two is rounded


def test_pictures_per_prompt_sizes_and_outputs(pipe: PixelTextToImagePipeline) -> None:
    images = pipe(
        PROMPTS, num_inference_steps=1, num_images_per_prompt=2, height=10, width=20, generator=seeded()
    ).images
    assert [image.size for image in images] == [(20, 10)] * 4 and images[0].mode == "RGB"
    (plain,) = pipe(PROMPTS[0], num_inference_steps=1, generator=seeded(), return_dict=False)
    assert plain[0].size == (16, 16)
    noise = torch.randn(4, 3, 16, 16, generator=seeded())
    rows = drawn(pipe, PROMPTS, num_images_per_prompt=2, latents=noise, negative_prompt=["a coat", "b"])
    single = drawn(pipe, PROMPTS[1], latents=noise[2:3], negative_prompt="b")
    assert np.abs(rows[2:3] - single).max() <= 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompt": "word " * 50}, "shorten it"),
        ({"output_type": "latent"}, "'pil' or 'np'"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 prompts"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 16, 16\) are needed"),
    ],
)
def test_arguments_that_do_not_fit(pipe: PixelTextToImagePipeline, options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        pipe(**{"prompt": "a coat"} | options)


def test_a_model_without_text(model: DiffusionModel, tmp_path: Path) -> None:
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = tiny(mid_block_type="UNetMidBlock2D", sample_size=None, **blocks)
    pipe = quiet(DiffusionModel(unet, model.schedule, None, model.codec).save(tmp_path / "model"))
    assert pipe.text_encoder is None and drawn(pipe, height=8, width=8).shape == (1, 8, 8, 3)
    with pytest.raises(InputError, match="takes no text"):
        pipe("a coat", height=8, width=8)
    with pytest.raises(InputError, match="give height and width"):
        pipe()
