"""diffusers' schedulers in the project's own loop: the picture of diffusers' own loop, from the same noise."""

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule
from sampling.solvers import run
from sampling.wrapped import KNOWN, wrap

# numpy's remarks on how diffusers' schedulers turn tensors into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array.*:DeprecationWarning")
V = "v_prediction"
NOISE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Toy(torch.nn.Module):
    """A smooth function of its input and timestep."""

    def forward(self, x: Tensor, timestep: float | Tensor, context: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return torch.tanh(x.roll(1, -1) + torch.sin(t / 300)) - 0.3 * x


class Timeless(Toy):
    """DPM-Solver and its kin cut a flow's timesteps to whole numbers."""

    def forward(self, x: Tensor, timestep: float | Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x, 0.0)


def fresh(draw: int) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(100 + draw))


def made(name: str, **options: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler")(**options)


def theirs(scheduler: Any, steps: int, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    draws = itertools.count(1)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: fresh(next(draws)), raising=False)
    scheduler.set_timesteps(steps)
    sample = NOISE * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(toy(scaled, float(t)), t, sample).prev_sample
    monkeypatch.undo()
    return sample


def ours(scheduler: Any, steps: int, toy: Toy, schedule: NoiseSchedule) -> Tensor:
    course = wrap(scheduler, steps)
    start = NOISE * float(getattr(scheduler, "init_noise_sigma", 1.0)) / float(course.scale[0])
    return run(course, start, Denoiser(toy, schedule), fresh)


def same_picture(
    scheduler: Any, steps: int, schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch, toy: Toy | None = None
) -> None:
    toy = toy or Toy()
    actual = ours(scheduler, steps, toy, schedule)
    expected = theirs(scheduler, steps, toy, monkeypatch)
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() < 2e-5 * max(1.0, float(expected.std()))


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {"timestep_spacing": "trailing"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TABLES: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", LEADING | {"clip_sample": False}),
    ("DDIM", TRAILING | {"clip_sample": True, "set_alpha_to_one": False}),  # its clipping is its own affair
    ("DDIMParallel", LEADING | {"clip_sample": False}),
    ("DDPM", TRAILING | {"clip_sample": False}),
    ("DDPMParallel", TRAILING | {"clip_sample": False}),
    ("PNDM", LEADING | {"skip_prk_steps": True}),
    ("PNDM", LEADING),
    ("LCM", {}),
    ("TCD", {}),
    ("DPMSolverMultistep", TRAILING),
    ("DPMSolverMultistep", TRAILING | {"solver_order": 3, "use_karras_sigmas": True}),
    ("DPMSolverMultistep", TRAILING | {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("DPMSolverSinglestep", {}),
    ("UniPCMultistep", TRAILING),
    # whose B(h) has no value at sigma = 0: diffusers' own loop then ends in NaN
    ("UniPCMultistep", TRAILING | {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("DEISMultistep", TRAILING),
    ("SASolver", TRAILING),
    ("EulerDiscrete", {}),
    ("EulerDiscrete", TRAILING | {"final_sigmas_type": "sigma_min"}),
    ("EulerAncestralDiscrete", TRAILING),
    ("HeunDiscrete", TRAILING),
    ("KDPM2Discrete", TRAILING),
    ("KDPM2AncestralDiscrete", TRAILING),
]


@pytest.mark.parametrize("prediction", ["epsilon", V])
@pytest.mark.parametrize(("name", "options"), TABLES)
def test_schedulers_on_tables(
    name: str, options: dict[str, Any], prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and spacings whose timesteps are whole, as diffusers rounds the others; 10 steps are 999 / 9 apart."""
    scheduler = made(name, prediction_type=prediction, **BETAS, **options)
    # karras timesteps are rounded, Singlestep's and some of PNDM's are not those of their levels
    toy = Timeless() if name == "DPMSolverSinglestep" or "use_karras_sigmas" in options else Toy()
    same_picture(scheduler, 10, NoiseSchedule.scaled_linear(prediction_type=prediction), monkeypatch, toy)


@pytest.mark.parametrize("name", ["LMSDiscrete"])
def test_linear_multistep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    same_picture(made(name, **BETAS), 10, NoiseSchedule.scaled_linear(), monkeypatch)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM", "TCD"])
def test_schedulers_at_zero_snr(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sigma is 4096 where abar is 0: x0 = -v becomes 2.4e-4 x - v and comes back as v itself."""
    options = {"prediction_type": V, "rescale_betas_zero_snr": True, **BETAS}
    options |= {} if name in ("LCM", "TCD") else TRAILING
    options |= {"clip_sample": False} if name == "DDIM" else {}
    schedule = NoiseSchedule.scaled_linear(prediction_type=V, zero_snr=True)
    same_picture(made(name, **options), 10, schedule, monkeypatch)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscrete", {"shift": 3.0}),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
        ("FlowMatchHeunDiscrete", {"shift": 3.0}),
        ("FlowMatchLCM", {}),
        ("DPMSolverMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
        ("UniPCMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("DEISMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_schedulers_of_flows(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some start at s = 1, where sigma has no end; the others' timesteps are cut to whole ones."""
    toy = Toy() if name.startswith("FlowMatch") else Timeless()
    same_picture(made(name, **options), 8, NoiseSchedule.flow(), monkeypatch, toy)


@pytest.mark.parametrize("prediction", ["epsilon", V])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EDMEuler", {}),
        ("EDMDPMSolverMultistep", {}),
        ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "sigma_schedule": "exponential"}),
    ],
)
def test_schedulers_of_edm(
    name: str, options: dict[str, Any], prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = made(name, sigma_data=0.7, prediction_type=prediction, **options)
    config = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.7, "prediction_type": prediction}
    same_picture(scheduler, 8, NoiseSchedule.from_config(config), monkeypatch)


def test_every_known_class_is_one_of_diffusers_and_is_tested() -> None:
    tested = {name for name, _ in TABLES} | {"LMSDiscrete", "EDMEuler", "EDMDPMSolverMultistep"}
    tested |= {"FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"}
    assert {f"{name}Scheduler" for name in tested} == set(KNOWN)
    assert all(hasattr(diffusers, name) for name in KNOWN)


def test_a_scheduler_serves_a_model_of_another_prediction() -> None:
    """It is told x0, by whatever name: the same pictures for each of its prediction types."""
    schedule = NoiseSchedule.scaled_linear(prediction_type=V)
    pictures = [
        ours(made("UniPCMultistep", prediction_type=kind, **BETAS, **TRAILING), 10, Toy(), schedule)
        for kind in ("sample", "epsilon", V)
    ]
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], rtol=1e-4, atol=1e-4)


def test_what_is_wrapped_stays_as_it_was_and_draws_nothing_itself() -> None:
    scheduler = made("EulerAncestralDiscrete", **BETAS)
    scheduler.set_timesteps(3)
    course, state = wrap(scheduler, 10), torch.get_rng_state()
    x = NOISE / float(course.scale[0]) * 14

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(x) / (1 + sigma)

    first = run(course, x, denoise, fresh)
    assert torch.equal(first, run(course, x, denoise, fresh))
    assert not torch.equal(first, run(course, x, denoise, lambda draw: -fresh(draw)))
    assert torch.equal(state, torch.get_rng_state())
    assert len(scheduler.timesteps) == 3 and scheduler.step_index is None
    assert torch.equal(wrap(scheduler).sigma, wrap(scheduler, 3).sigma)  # as it has been set
    assert len(course.sigma) == 10 and course.sigma.dtype == torch.float64


def test_many_threads_at_once_draw_their_own_noise() -> None:
    """Both are within a step at the same time: each waits for the other where it draws."""
    course = wrap(made("EulerAncestralDiscrete", **BETAS), 5)
    barrier = threading.Barrier(2, timeout=120)
    results: dict[int, Tensor] = {}

    def noise_of(seed: int, wait: Callable[[], Any]) -> Callable[[int], Tensor]:
        def noise(draw: int) -> Tensor:
            wait()
            return torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(1000 * seed + draw))

        return noise

    def draw(seed: int, wait: Callable[[], Any]) -> Tensor:
        return run(course, 14 * NOISE, lambda x, sigma: torch.tanh(x), noise_of(seed, wait))

    def work(seed: int) -> None:
        results[seed] = draw(seed, barrier.wait)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert torch.equal(results[seed], draw(seed, lambda: None))


@pytest.mark.parametrize(
    ("scheduler", "steps", "words"),
    [
        (made("ScoreSdeVe"), 10, "ScoreSdeVeScheduler cannot be wrapped: DDIMScheduler"),
        ("euler", 10, "str cannot be wrapped"),
        (made("DDPM", variance_type="learned_range"), 10, "variance"),
        (made("DDIM"), 0, "steps is 0"),
        (made("DDIM"), 2000, "DDIMScheduler: "),
        (made("LCM"), 51, "LCMScheduler: "),
        (made("DDIM"), None, "no timesteps yet"),
        (made("FlowMatchEulerDiscrete", use_dynamic_shifting=True), 4, "mu"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_wrapped(scheduler: Any, steps: int | None, words: str) -> None:
    with pytest.raises(InputError) as error:
        wrap(scheduler, steps)
    assert "\n" not in str(error.value) and words in str(error.value)


def test_a_prediction_that_a_scheduler_has_not_is_one_line() -> None:
    course = wrap(made("EulerAncestralDiscrete", prediction_type="sample"), 3)
    with pytest.raises(InputError, match="EulerAncestralDiscreteScheduler: prediction_type not implemented"):
        run(course, NOISE, lambda x, sigma: x, fresh)
