"""diffusers' samplers and `Denoiser` make the same x0 of the same network output, at every t."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from diffusion_unet.conditioning import Conditioning
from diffusion_unet.config import UNetConfig
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.schedule import CLASSES, NoiseSchedule
from diffusion_unet.unet import UNet

TABLES = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "zero SNR": lambda **kind: NoiseSchedule.scaled_linear(**kind, zero_snr=True),
    "steep zero SNR": lambda **kind: NoiseSchedule.linear(**kind, zero_snr=True),
    "trained": lambda **kind: NoiseSchedule.from_alphas_cumprod(torch.linspace(0.9999, 0.002, 1000) ** 1.5, **kind),
}
# numpy's remark on how diffusers' schedulers turn tensors into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Toy(nn.Module):
    """A network that looks at all it is given; bounded, and never the same at two timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, float | Tensor]] = []

    def forward(self, x: Tensor, timestep: float | Tensor, context: Tensor | None = None) -> Tensor:
        self.calls.append((x, timestep))
        t = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return torch.tanh(x.roll(1, -1) + torch.sin(t / 100)) - 0.3 * x


def x0_of(scheduler: Any, sample: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """The scheduler's own estimate of x0 at its present step."""
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return scheduler.convert_model_output(output, sample=sample)
    return scheduler.step(output, t, sample).pred_original_sample


def compare(scheduler: Any, schedule: NoiseSchedule, skip: int = 0, tolerance: float = 1e-5) -> None:
    """Holds x0 of every step of the scheduler against ours, in units of the largest value that x0 is made from.

    x is noisy data at our level of the scheduler's timestep. Both are given the same network output; that the scheduler
    would have asked the network the same is asserted beside it (1e-4, the precision of its float32 levels).
    """
    toy, generator, worst, worst_input = Toy(), torch.Generator().manual_seed(0), 0.0, 0.0
    scheduler.set_timesteps(schedule.num_train_timesteps)
    timesteps, sigma = scheduler.timesteps[skip:], schedule.sigma(scheduler.timesteps[skip:])
    if schedule.prediction_type == "flow_prediction":  # timesteps are cut to whole numbers there, the levels are not
        s = scheduler.sigmas[:-1].double()
        sigma = s / (1 - s)
    x0, noise = torch.randn(2, len(sigma), 3, 4, 4, generator=generator).unbind(0)
    x = (x0 + sigma.reshape(-1, 1, 1, 1) * noise).float()
    ours = Denoiser(toy, schedule)(x, sigma)
    (network_x, network_t), output = toy.calls[-1], toy(*toy.calls[-1])
    cut = 1.0 if schedule.prediction_type == "flow_prediction" else 1e-4
    assert (network_t - timesteps).abs().max() < cut
    scaling = schedule.scaling(sigma)
    c_in, c_out = scaling.c_in.float().reshape(-1, 1, 1, 1), scaling.c_out.float().reshape(-1, 1, 1, 1)
    sample = x if hasattr(scheduler, "is_scale_input_called") else x * c_in  # the units of x between steps
    size = (x.abs() + (c_out * output).abs()).clamp_min(1)
    for i, t in enumerate(timesteps):
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = i + skip
        row = slice(i, i + 1)
        fed = scheduler.scale_model_input(sample[row], t)
        theirs = x0_of(scheduler, sample[row], output[row], t)
        worst = max(worst, float(((theirs - ours[row]) / size[row]).abs().max()))
        worst_input = max(worst_input, float((fed - network_x[row]).abs().max()))
    assert worst < tolerance
    assert worst_input < 1e-4


@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_tables(cls, table: str, prediction: str) -> None:
    schedule = TABLES[table](prediction_type=prediction)
    config = json.loads(json.dumps(schedule.to_config()))
    scheduler = cls.from_config({key: value for key, value in config.items() if key in keys_of(cls)})
    # the last timestep of a zero-SNR table is clamped, which DDIM does not do
    skip = 1 if "zero SNR" in table and (cls is DDIMScheduler or "steep" in table) else 0
    # rescaling in float32 loses three digits of the table's last entries, by which an epsilon network's x0 is divided
    compare(scheduler, schedule, skip, tolerance=3e-5 if schedule.zero_snr and prediction == "epsilon" else 1e-5)


def keys_of(cls) -> set[str]:
    return set(cls().config)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow(shift: float) -> None:
    schedule = NoiseSchedule.flow(shift=shift)
    scheduler = DPMSolverMultistepScheduler.from_config(schedule.to_config())
    compare(scheduler, schedule)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm(sigma_data: float) -> None:
    schedule = NoiseSchedule.edm(sigma_data=sigma_data, sigma_min=0.01, sigma_max=60.0)
    compare(EDMEulerScheduler.from_config(schedule.to_config()), schedule)


def test_edm_with_the_sign_turned() -> None:
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}
    schedule = NoiseSchedule.from_config(config | {"sigma_schedule": "exponential"})
    assert schedule.prediction_type == "edm_v" and schedule.spacing == "exponential"
    compare(EDMEulerScheduler.from_config(schedule.to_config()), schedule)


def test_continuous_euler() -> None:
    """Stable Video Diffusion's: EDM with sigma_data 1 and c_noise = ln(sigma) / 4 under the name of v-prediction."""
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    }
    schedule = NoiseSchedule.from_config(config)
    assert (schedule.sigma_min, schedule.sigma_max, schedule.spacing) == (0.002, 700.0, "karras")
    assert schedule.to_config() == config
    compare(EulerDiscreteScheduler.from_config(schedule.to_config()), schedule)


def test_flow_match_euler_takes_the_same_step() -> None:
    """Its x0 is not told; its Euler step from s to s' is (1 - s') x0 + s' (the noise that x0 implies)."""
    schedule = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert schedule.prediction_type == "flow_prediction" and schedule.shift == 3
    scheduler, toy = FlowMatchEulerDiscreteScheduler.from_config(schedule.to_config()), Toy()
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps[1:], start=1):  # the first, s = 1, is an infinite sigma
        s, after = scheduler.sigmas[i : i + 2].tolist()
        sample = torch.randn(1, 3, 4, 4, generator=generator)
        x0 = Denoiser(toy, schedule)(sample / (1 - s), s / (1 - s))
        network_x, network_t = toy.calls[-1]
        assert network_t == pytest.approx(float(t), rel=1e-5)
        torch.testing.assert_close(network_x, sample)
        scheduler._step_index = i
        theirs = scheduler.step(toy(network_x, network_t), t, sample).prev_sample
        ours = (1 - after) * x0 + after * (sample - (1 - s) * x0) / s
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_defaults_of_every_readable_class_are_those_of_diffusers() -> None:
    checked = 0
    for name, defaults in CLASSES.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        stock = {key: parameter.default for key, parameter in parameters.items()}
        checked += "num_train_timesteps" in stock  # a few show no signature without scipy or torchsde
        assert not stock.get("clip_sample") or name.startswith("DD")
        for key, value in defaults.items():
            assert stock.get(key, value) == value, (name, key)
    assert checked >= 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_levels_by_row(dtype: torch.dtype) -> None:
    """sigma [B] is each row alone; the answer has x's dtype, the network is called in its own."""
    toy, schedule = Toy(), NoiseSchedule.linear(prediction_type="v_prediction")
    denoiser = Denoiser(toy, schedule)
    sigma = torch.tensor([0.05, 0.7, 3.0, 90.0])
    x = (torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1)) * (1 + sigma.reshape(-1, 1, 1, 1))).to(
        dtype
    )
    together = denoiser(x, sigma)
    assert together.dtype == dtype and together.shape == x.shape
    _, t = toy.calls[-1]
    assert isinstance(t, Tensor) and t.shape == (4,)
    assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row in range(4):
        alone = denoiser(x[row : row + 1], float(sigma[row]))
        torch.testing.assert_close(
            alone,
            together[row : row + 1],
            rtol=2e-5 if dtype != torch.bfloat16 else 0.02,
            atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
        )
    torch.testing.assert_close(denoiser(x, torch.tensor(0.7)), denoiser(x, 0.7))


def test_predict_is_the_network_and_target_its_answer() -> None:
    toy, schedule = Toy(), NoiseSchedule.edm()
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.3, 4.0])
    output = Denoiser(toy, schedule).predict(x, sigma)
    scaling = schedule.scaling(sigma)
    c_skip, c_out = scaling.c_skip.float().reshape(-1, 1, 1, 1), scaling.c_out.float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(Denoiser(toy, schedule)(x, sigma), c_skip * x + c_out * output)


def test_a_network_of_another_precision() -> None:
    network = nn.Conv2d(1, 1, 1).to(torch.bfloat16)
    seen: list[torch.dtype] = []

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = network

        def forward(self, x: Tensor, timestep: float | Tensor, context: Tensor | None = None) -> Tensor:
            seen.append(x.dtype)
            return self.conv(x)

    out = Denoiser(Half(), NoiseSchedule.linear())(torch.ones(1, 1, 2, 2), 1.0)
    assert out.dtype == torch.float32 and seen == [torch.bfloat16]


def small_unet() -> UNet:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    }
    return UNet(UNetConfig.from_diffusers(config)).eval()


def test_real_network_with_a_cache_is_the_plain_one() -> None:
    unet = small_unet()
    denoiser = Denoiser(unet, NoiseSchedule.linear(prediction_type="v_prediction"))
    generator = torch.Generator().manual_seed(3)
    conditioning = Conditioning(context=torch.randn(2, 5, 12, generator=generator))
    masked = Conditioning(conditioning.context, mask=torch.tensor([[True] * 5, [True, True, False, False, False]]))
    x = torch.randn(2, 1, 8, 8, generator=generator)
    levels = [0.1, 1.0, 12.3]
    with torch.no_grad():
        for given in (conditioning, masked):
            cache = denoiser.precompute(levels, given)
            assert cache is not None
            for sigma in levels:
                plain = denoiser(x, sigma, given)
                torch.testing.assert_close(denoiser(x, sigma, given, cache=cache), plain, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(denoiser(x, 1.0, conditioning), denoiser(x, 1.0, masked), atol=1e-5)
    assert Denoiser(Toy(), NoiseSchedule.linear()).precompute(levels) is None
