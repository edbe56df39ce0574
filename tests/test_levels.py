"""Noise levels: spacings against diffusers, closed forms and a high-precision beta function; lists of a user's own."""

from typing import Any

import mpmath  # comes with torch
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule
from sampling.levels import MAX_STEPS, SPACINGS, beta_quantile, checked_sigmas, sigmas

# numpy's remark on how diffusers' schedulers turn tensors into arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
V = "v_prediction"


def test_levels_are_fractional_and_end_at_zero() -> None:
    schedule = NoiseSchedule.linear()
    for steps in (1, 3, 30, 999, 1000):
        for spacing in SPACINGS:
            levels = sigmas(schedule, steps, spacing)
            assert levels.dtype == torch.float64 and levels.shape == (steps + 1,)
            assert (levels.diff() < 0).all() and levels[-1] == 0
    t = schedule.timestep(sigmas(schedule, 30, "trailing")[:-1])
    torch.testing.assert_close(t, 999 - torch.arange(30).double() * 1000 / 30, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "spacings"),
    [
        (NoiseSchedule.cosine(prediction_type=V, zero_snr=True), SPACINGS),
        (NoiseSchedule.flow(shift=3.0), ("flow", "simple", "karras", "exponential", "beta")),
        (NoiseSchedule.edm(), ("karras", "exponential", "beta")),
    ],
    ids=["zero SNR", "flow", "edm"],
)
def test_every_kind_of_schedule_has_its_spacings(schedule: NoiseSchedule, spacings: tuple[str, ...]) -> None:
    for spacing in spacings:
        for steps in (1, 2, 20):
            levels = sigmas(schedule, steps, spacing)
            assert (levels.diff() < 0).all() and levels[-1] == 0
            assert levels[0] <= schedule.sigma_max * (1 + 1e-9) and levels[-2] >= schedule.sigma_min * (1 - 1e-9)
            assert spacing == "leading" or levels[0] == pytest.approx(schedule.sigma_max, rel=1e-9)


def test_simple_picks_the_entries_that_others_pick_where_these_are_whole() -> None:
    """ComfyUI's and A1111's rule written out, table[-1 - int(k * T / steps)]."""
    schedule = NoiseSchedule.scaled_linear()
    for steps in (1, 8, 20, 50, 1000):
        table = schedule.sigma(torch.arange(1000)).flip(0)
        picked = table[[int(k * 1000 / steps) for k in range(steps)]]
        torch.testing.assert_close(sigmas(schedule, steps, "simple")[:-1], picked, rtol=1e-9, atol=0)
    flow = NoiseSchedule.flow(shift=3.0)
    assert torch.equal(sigmas(flow, 7, "simple"), sigmas(flow, 7))


# ---- beta ----


@pytest.mark.parametrize("a", [0.6, 0.5, 0.9])
def test_quantiles_of_beta(a: float) -> None:
    """To float64's last digits, by mpmath's incomplete beta function at 30 digits."""
    p = torch.tensor([0, 1e-15, 1e-6, 0.01, 0.1, 0.3, 0.5 - 1e-12, 0.5, 0.7, 0.95, 0.99999, 1], dtype=torch.float64)
    with mpmath.workdps(30):
        for expected, x in zip(p.tolist(), beta_quantile(p, a).tolist(), strict=True):
            back = mpmath.betainc(a, a, 0, x, regularized=True)
            # near 1 a last digit of x is worth more of p: (1 - x)^(a - 1)
            assert abs(back - expected) < 1e-15 + 2e-16 * max(1, (1 - x + 1e-16) ** (a - 1)) * 4


def test_quantiles_of_the_arcsine_law_are_its_closed_form() -> None:
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(p, 0.5), (torch.pi * p / 2).sin() ** 2, rtol=1e-13, atol=1e-15)


def test_beta_is_that_of_scipy_and_diffusers() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = torch.linspace(0, 1, 77, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(p), torch.from_numpy(stats.beta.ppf(p.numpy(), 0.6, 0.6)))
    schedule = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True})
    stock = EulerDiscreteScheduler.from_config(schedule.to_config())
    stock.set_timesteps(12)
    torch.testing.assert_close(sigmas(schedule, 12).float(), stock.sigmas, rtol=5e-5, atol=0)


def test_beta_spacing_is_its_quantiles_between_the_ends() -> None:
    """diffusers' rule, low + ppf * (high - low) at evenly spaced probabilities; for a flow in s = sigma/(1 + sigma)."""
    for schedule, flow in ((NoiseSchedule.scaled_linear(), False), (NoiseSchedule.flow(), True)):
        ends = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float64)
        levels = sigmas(schedule, 9, "beta")[:-1]
        if flow:
            levels, ends = levels / (1 + levels), ends / (1 + ends)
        inner = ((levels - ends[0]) / (ends[1] - ends[0]))[1:-1].tolist()
        for k, x in enumerate(inner, 1):
            assert float(mpmath.betainc(0.6, 0.6, 0, x, regularized=True)) == pytest.approx(1 - k / 8, abs=1e-9)


# ---- bad input, and lists of a user's own ----


@pytest.mark.parametrize(
    ("schedule", "steps", "spacing", "words"),
    [
        (NoiseSchedule.linear(), 0, None, ["steps is 0"]),
        (NoiseSchedule.linear(), 2.5, None, ["steps is 2.5"]),
        (NoiseSchedule.linear(), True, None, ["steps is True"]),
        (NoiseSchedule.linear(), 1001, "leading", ["steps is 1001", "1000"]),
        (NoiseSchedule.edm(), 10_001, None, ["steps is over 10000"]),
        (NoiseSchedule.linear(), 10, "random", ["'random'", "trailing", "karras", "beta", "simple"]),
        (NoiseSchedule.linear(), 10, "flow", ["'flow'", "trailing"]),
        (NoiseSchedule.flow(), 10, "trailing", ["'trailing'", "karras", "simple"]),
        (NoiseSchedule.edm(), 10, "leading", ["'leading'", "karras"]),
        (NoiseSchedule.edm(), 10, "simple", ["'simple'", "beta"]),
    ],
)
def test_bad_levels(schedule: NoiseSchedule, steps: Any, spacing: str | None, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        sigmas(schedule, steps, spacing)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_a_list_of_ones_own() -> None:
    expected = torch.tensor([14.0, 3.5, 0.25, 0.0], dtype=torch.float64)
    for values in ([14, 3.5, 0.25], [14, 3.5, 0.25, 0], (14.0, 3.5, 0.25, 0.0), torch.tensor([14, 3.5, 0.25])):
        checked = checked_sigmas(values)
        assert torch.equal(checked, expected) and checked.dtype == torch.float64
    given = [1.0]
    assert checked_sigmas(given).tolist() == [1.0, 0.0] and given == [1.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "empty"),
        ([0], "number 1 is 0"),
        ([3.0, 0.0, 0.0], "number 2 is 0"),
        ([3.0, 4.0], "number 2 is 4, not below the 3"),
        ([3.0, 3.0, 0.0], "not below"),
        ([3.0, -1.0], "number 2 is -1"),
        ([float("nan")], "number 1 is nan"),
        ([float("inf"), 1.0], "number 1 is inf"),
        ([3.0, float("nan"), 0.0], "number 2 is nan"),
        ([1e300], "1e+300"),
        ([True], "True is no number"),
        (["3"], "'3' is no number"),
        ([[3.0]], "no number"),
        (range(MAX_STEPS + 2, 0, -1), "over 10000"),
    ],
)
def test_bad_lists(values: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        checked_sigmas(values)
    assert "\n" not in str(error.value) and words in str(error.value)
