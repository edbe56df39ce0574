"""Averages of the weights, against weighted sums written out and the definition of the power function's profile."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffusion_unet.errors import InputError
from training.averages import parse
from training.ema import EMA, make_emas

NAMES = ("0.6", "constant-0.8", "power-0.1", "power-0.25")
NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


def parameters() -> dict[str, torch.nn.Parameter]:
    return {
        "a": torch.nn.Parameter(torch.zeros(3)),
        "b": torch.nn.Parameter(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)),
    }


def integral(f: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """Of f over [low, high], exact for polynomials of degree 119."""
    half = (high - low) / 2
    return float((WEIGHTS * f(low + half * (NODES + 1))).sum() * half)


def exponent(width: float) -> float:
    """gamma, by halving an interval, of the power function whose relative width it is."""
    low, high = 0.0, 1e4
    for _ in range(200):
        gamma = (low + high) / 2
        wider = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) > width
        low, high = (gamma, high) if wider else (low, gamma)
    return low


def shares(name: str, steps: int) -> np.ndarray:
    """What parameters 0 (at the start) ... `steps` count in the average after `steps` steps."""
    n = np.arange(1, steps + 1)
    if name.startswith("power-"):
        keep = (1 - 1 / n) ** (exponent(float(name.removeprefix("power-"))) + 1)
    else:
        keep = np.full(steps, 0.8) if name == "constant-0.8" else np.minimum(0.6, (1 + n) / (10 + n))
    taken = np.concatenate([[1.0], 1 - keep])
    later = np.concatenate([np.cumprod(keep[::-1])[::-1], [1.0]])
    return taken * later


def test_several_averages_at_once_are_weighted_sums() -> None:
    live = {name: torch.nn.Parameter(tensor.detach().double()) for name, tensor in parameters().items()}
    emas = make_emas(NAMES, live)
    assert [ema.name for ema in emas] == list(NAMES)
    seen = {name: [tensor.detach().clone()] for name, tensor in live.items()}
    torch.manual_seed(0)
    for step in range(1, 41):
        for name, tensor in live.items():
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape))
            seen[name].append(tensor.detach().clone())
        for ema in emas:
            ema.update(step)
    for ema in emas:
        share = torch.from_numpy(shares(ema.name, 40))
        assert float(share.sum()) == pytest.approx(1)
        for name, average in ema.state().items():
            expected = torch.einsum("t,t...->...", share, torch.stack(seen[name]))
            torch.testing.assert_close(average, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["power-0.05", "power-0.1", "power-0.2", "power-0.28"])
def test_power_function_is_its_integral(name: str) -> None:
    """Step i of n counts the integral of (gamma + 1) t^gamma over (i - 1)/n < t < i/n: the profile is that of the paper
    at every n, and its standard deviation is the width."""
    average, steps = parse(name), 50
    gamma = average.number

    def density(t: np.ndarray) -> np.ndarray:
        return (gamma + 1) * t**gamma

    share = np.zeros(steps)
    for step in range(1, steps + 1):
        share *= average.decay(step)
        share[step - 1] += 1 - average.decay(step)
    expected = [integral(density, (i - 1) / steps, i / steps) for i in range(1, steps + 1)]
    np.testing.assert_allclose(share, expected, rtol=0, atol=1e-6)
    mean = integral(lambda t: t * density(t), 0, 1)
    width = math.sqrt(integral(lambda t: (t - mean) ** 2 * density(t), 0, 1))
    assert width == pytest.approx(float(name.removeprefix("power-")), rel=1e-3)


@pytest.mark.parametrize(("name", "gamma"), [("power-0.05", 16.97), ("power-0.10", 6.94)])
def test_published_exponents(name: str, gamma: float) -> None:
    """Karras et al. 2024, section 3.1: the two averages that its runs keep."""
    assert parse(name).number == pytest.approx(gamma, abs=0.005)


def test_the_widest_power_function_is_nearly_the_plain_mean() -> None:
    live = parameters()
    ema = EMA(live, "power-0.288675")
    values = torch.arange(1.0, 31.0)
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            live["a"].fill_(value)
        ema.update(step)
    assert ema.state()["a"][0].item() == pytest.approx(values.mean().item(), rel=1e-3)


def test_a_power_function_forgets_the_start() -> None:
    live = parameters()
    ema = EMA(live, "power-0.05")
    with torch.no_grad():
        live["a"].fill_(7.0)
    ema.update(1)
    assert ema.state()["a"].tolist() == [7.0] * 3


def test_an_average_of_what_stays_is_what_stays() -> None:
    live = parameters()
    for ema in make_emas(("0.9", *NAMES), live):
        ema.update(1)
        ema.update(2)
        assert all(torch.equal(ema.state()[name], tensor) for name, tensor in live.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "'fast' is not a decay such as 0.9999, constant-0.999, or power-0.05"),
        ("", "is not a decay"),
        ("1e-2", "is not a decay"),
        ("nan", "is not a decay"),
        ("power-", "is not a decay"),
        ("warmed-0.9", "is not a decay"),
        ("../0.9", "is not a decay"),
        ("0.9\n", "is not a decay"),
        ("1.0", "decay of 1.0 must lie between 0 and 1"),
        ("0", "decay of 0 must lie between 0 and 1"),
        ("constant-1", "decay of constant-1 must"),
        ("power-0", "width of power-0 must be above 0 and at most 0.2886"),
        ("power-0.3", "width of power-0.3 must"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(InputError, match=r"^train\.ema: ") as caught:
        parse(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_is_checked_without_torch() -> None:
    code = "import sys; from training.averages import parse; parse('power-0.05'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_swapping_in_and_back_also_after_an_error() -> None:
    live = parameters()
    ema = EMA(live, "constant-0.5")
    with torch.no_grad():
        live["a"].fill_(8.0)
    ema.update(100)
    with pytest.raises(RuntimeError, match="drawing failed"), ema.swapped_in():
        assert live["a"].tolist() == [4.0] * 3
        assert ema.state()["a"].tolist() == [4.0] * 3
        raise RuntimeError("drawing failed")
    assert live["a"].tolist() == [8.0] * 3
    assert ema.state()["a"].tolist() == [4.0] * 3
