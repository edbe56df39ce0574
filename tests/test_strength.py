"""Noise levels of a strength, against those at which diffusers begins."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule
from sampling.edit import strength_levels
from sampling.levels import sigmas

# numpy's remark on how diffusers' schedulers turn tensors into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_a_strength_begins_where_diffusers_begins(spacing: str, strength: float) -> None:
    course = 20
    options = {"timestep_spacing": spacing, "steps_offset": 0}
    if spacing == "karras":
        options = {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(tiny.euler().config, **options)
    scheduler.set_timesteps(course)
    pipe = SimpleNamespace(scheduler=scheduler)
    timesteps, count = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipe, course, strength, "cpu")
    schedule = NoiseSchedule.from_config(dict(scheduler.config))
    levels = strength_levels(schedule, count, spacing, strength)
    assert count == round(course * strength) and levels.shape == (count + 1,) and levels[-1] == 0
    if spacing == "linspace":  # between whole timesteps, where its sigmas are linear and these are in ln sigma
        assert np.abs(schedule.timestep(levels[:-1]).numpy() - timesteps.numpy()).max() < 1e-2
    else:
        expected = scheduler.sigmas[course - count :].double()
        assert torch.allclose(levels, expected, rtol=1e-4, atol=0), (levels, expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras", "exponential"])
def test_the_steps_asked_for_are_run_at_every_strength(spacing: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    before = 0.0
    for strength in (0.02, 0.05, 0.117, 0.3, 0.31, 0.32, 0.5, 0.618, 0.77, 0.9, 0.99, 1.0):
        levels = strength_levels(schedule, 7, spacing, strength)
        assert len(levels) == 8 and (levels.diff() < 0).all() and levels[-1] == 0
        assert levels[0] > before
        before = float(levels[0])
        if spacing == "trailing":
            assert abs(float(schedule.timestep(levels[0])) + 1 - 1000 * strength) < 3
    assert torch.equal(levels, sigmas(schedule, 7, spacing))


def test_strengths_of_schedules_without_a_table() -> None:
    for schedule in (NoiseSchedule.flow(shift=3.0), NoiseSchedule.edm()):
        levels = strength_levels(schedule, 6, None, 0.6)
        assert torch.allclose(levels, sigmas(schedule, 10)[4:], rtol=1e-12)
        assert torch.equal(strength_levels(schedule, 6, None, 1.0), sigmas(schedule, 6))


def test_strengths_too_small_for_the_steps() -> None:
    schedule = NoiseSchedule.scaled_linear()
    for steps, strength, spacing in ((20, 0.01, "leading"), (2, 1e-300, "leading"), (9000, 0.8, "karras")):
        with pytest.raises(InputError, match=f"strength {strength} leaves no room for {steps} steps"):
            strength_levels(schedule, steps, spacing, strength)
    with pytest.raises(InputError, match="steps is 0"):
        strength_levels(schedule, 0, None, 0.5)
    with pytest.raises(InputError, match="bunched"):
        strength_levels(schedule, 5, "bunched", 0.5)
