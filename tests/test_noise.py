"""Noise sources beside torch's generator and published numbers of CUDA; variations beside the sphere's geometry."""

import math

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion_unet.errors import InputError
from diffusion_unet.random import Purpose, normal
from sampling.noise import RNGS, checked_seed, noise_of, slerp, strengths

SHAPE = (4, 5, 6)

# torch.randn(8, 8, device="cuda") after torch.manual_seed(0), as printed in the notes of CUDA MODE lecture 18, "Fusing
# kernels"; there too the relu of this + 0.5 * the second such call + the third, of 8 numbers: its first and last row.
CUDA_0 = """
-0.9247 -0.4253 -2.6438 0.1452 -0.1209 -0.5797 -0.6229 -0.3284
-1.0745 -0.3631 -1.6711 2.2655 0.3117 -0.1842 1.2866 1.1820
-0.1271 1.2169 1.4353 1.0605 -0.4941 -1.4244 -0.7244 -1.2973
0.0697 -0.0074 1.8969 0.6878 -0.0779 -0.8373 1.3506 -0.2879
-0.5965 -0.3283 -0.9086 -0.8059 -0.7407 -0.0504 0.5435 1.5150
0.0141 0.4532 1.6349 0.7124 -0.1806 1.0252 -1.4622 -0.7554
-0.1836 0.3824 0.3918 -0.0830 0.8971 -1.1123 0.1116 0.4863
-0.5499 -0.3231 -0.5469 0.9049 0.2837 0.1210 0.4730 -1.0823
"""
CUDA_0_SUM = """
1.7098 0 0 0 0.67049 0 0.34424 0.011223
1.5554 0 0 0.94380 0.0029795 0.074125 1.6286 0
"""
# torch.randn(2, 5, device="cuda") after torch.manual_seed(42), as printed in flashinfer's documentation of Sample.
CUDA_42 = "0.1940 2.1614 -0.1721 0.8491 -1.9244 0.6530 -0.6494 -0.8175 0.5280 -1.2753"
# A1111's modules/rng_philox.py, seed 0, what its docstring expects.
A1111_0 = """
-0.92466259 -0.42534415 -2.6438457 0.14518388 -0.12086647 -0.57972564 -0.62285122 -0.32838709
-1.07454231 -0.36314407 -1.67105067 2.26550497
"""


def numbers(text: str) -> Tensor:
    return torch.tensor([float(word) for word in text.split()])


# --- sources


def test_philox_is_the_projects_own() -> None:
    noise = noise_of(11, SHAPE)
    for draw in (0, 3, 1):
        assert torch.equal(noise(draw), normal(11, Purpose.PICTURE, 0, SHAPE, draw)[0])


@pytest.mark.parametrize("seed", [0, 2**63 + 7, 2**64 - 1])
def test_torch_is_what_pipelines_of_diffusers_draw(seed: int) -> None:
    """For a batch, with a generator for each picture: the first latents, then the noise of each stochastic step."""
    generators = [torch.Generator().manual_seed(number) for number in (5, seed)]
    noise = noise_of(seed, SHAPE, "torch")
    for draw in range(3):
        batch = randn_tensor((2, *SHAPE), generator=generators, device=torch.device("cpu"), dtype=torch.float32)
        assert torch.equal(noise(draw), batch[1])


@pytest.mark.parametrize("rng", RNGS)
def test_a_draw_is_the_same_in_any_order(rng: str) -> None:
    in_turn = noise_of(3, SHAPE, rng)
    expected = [in_turn(draw) for draw in range(5)]
    assert all(one.shape == SHAPE and one.dtype == torch.float32 for one in expected)
    assert len({one.numpy().tobytes() for one in expected}) == 5
    noise = noise_of(3, SHAPE, rng)
    for draw in (4, 0, 0, 3, 1, 2):
        assert torch.equal(noise(draw), expected[draw])
    assert not torch.equal(noise_of(4, SHAPE, rng)(0), expected[0])


def test_nv_is_what_torch_draws_on_a_gpu() -> None:
    noise = noise_of(0, (1, 8, 8), "nv")
    bias = noise_of(0, (1, 1, 8), "nv")
    torch.testing.assert_close(noise(0).flatten(), numbers(CUDA_0), rtol=0, atol=5.1e-5)
    total = torch.relu(noise(0) + 0.5 * noise(1) + bias(2))[0, [0, -1]].flatten()
    torch.testing.assert_close(total, numbers(CUDA_0_SUM), rtol=1e-4, atol=5.1e-5)
    torch.testing.assert_close(noise_of(42, (1, 2, 5), "nv")(0).flatten(), numbers(CUDA_42), rtol=0, atol=5.1e-5)
    # These are computed with 2 pi in float64, and what A1111 draws with it in float32.
    torch.testing.assert_close(noise_of(0, (1, 3, 4), "nv")(0).flatten(), numbers(A1111_0), rtol=0, atol=3e-7)


def philox_words(counter: tuple[int, ...], seed: int) -> tuple[int, int]:
    """The first two words of Philox 4x32-10, in Python's whole numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        one, two = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = two // 2**32 ^ c1 ^ k0, two % 2**32, one // 2**32 ^ c3 ^ k1, one % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (1234567890, 1), (2**64 - 3, 20)])
def test_nv_has_the_bits_of_a1111(seed: int, draw: int) -> None:
    """Its arithmetic with its types: words of 32 bits times float32, for which numpy takes float64."""
    words = [philox_words((draw, 0, element, 0), seed) for element in range(math.prod(SHAPE))]
    x, y = np.array(words, dtype=np.uint32).T
    step = np.array([2.3283064e-10], dtype=np.float32)
    turn = np.array([2.3283064e-10 * 6.2831855], dtype=np.float32)
    expected = np.sqrt(-2.0 * np.log(x * step + step / 2)) * np.sin(y * turn + turn / 2)
    assert np.array_equal(noise_of(seed, SHAPE, "nv")(draw).numpy().ravel(), expected.astype(np.float32))


# --- variations


@pytest.mark.parametrize("rng", RNGS)
def test_a_variation_goes_from_one_seed_to_the_other(rng: str) -> None:
    own, other = noise_of(1, SHAPE, rng), noise_of(2, SHAPE, rng)
    row = [noise_of(1, SHAPE, rng, variation_seed=2, variation_strength=t) for t in strengths(5)]
    assert torch.equal(row[0](0), own(0)) and torch.equal(row[-1](0), other(0))
    distances = [float((noise(0) - own(0)).norm()) for noise in row]
    assert distances == sorted(distances) and distances[0] < distances[1] < distances[-1]
    for noise in row:
        assert torch.equal(noise(2), own(2))


def angle(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return math.atan2(float((a / a.norm() - b / b.norm()).norm()), float((a / a.norm() + b / b.norm()).norm())) * 2


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_slerp_turns_at_an_even_rate_and_keeps_the_length(t: float) -> None:
    a, b = noise_of(1, (4, 64, 64))(0), noise_of(2, (4, 64, 64))(0)
    b = b * (a.norm() / b.norm())  # on one sphere
    between = slerp(a, b, t)
    whole = angle(a, b)
    assert between.dtype == torch.float32 and between.shape == a.shape
    assert angle(a, between) == pytest.approx(t * whole, abs=1e-6)
    assert angle(between, b) == pytest.approx((1 - t) * whole, abs=1e-6)
    assert float(between.norm() / a.norm()) == pytest.approx(1, abs=1e-6)


def test_slerp_of_plain_vectors() -> None:
    a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(slerp(a, b, 0.5), torch.tensor([[[half, half]]]))
    third = torch.tensor([[[math.cos(math.pi / 6), math.sin(math.pi / 6)]]])
    torch.testing.assert_close(slerp(a, b, 1 / 3), third)


def test_slerp_without_an_arc_is_straight() -> None:
    a = noise_of(1, SHAPE)(0)
    assert torch.equal(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, 3 * a, 0.25), 1.5 * a)
    torch.testing.assert_close(slerp(a, -a, 0.25), 0.5 * a)
    near = a + 1e-9 * noise_of(2, SHAPE)(0)
    assert torch.isfinite(slerp(a, near, 0.5)).all()
    same = noise_of(7, SHAPE, variation_seed=7, variation_strength=0.3)
    assert torch.equal(same(0), noise_of(7, SHAPE)(0))


def test_a_row_has_both_ends() -> None:
    assert strengths(2) == [0, 1] and strengths(5) == [0, 0.25, 0.5, 0.75, 1]


# --- bad input


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rng": "cuda"}, ["'cuda'", "philox, torch, nv"]),
        ({"seed": -1}, ["seed -1", "2**64"]),
        ({"seed": 2**64}, ["seed 18446744073709551616"]),
        ({"seed": 1.0}, ["seed 1.0"]),
        ({"seed": True}, ["seed True"]),
        ({"variation_seed": -2}, ["variation_seed -2"]),
        ({"variation_seed": 1, "variation_strength": 1.5}, ["variation_strength is 1.5", "0"]),
        ({"variation_seed": 1, "variation_strength": float("nan")}, ["variation_strength is nan"]),
        ({"variation_seed": 1, "variation_strength": "half"}, ["variation_strength is 'half'"]),
        ({"variation_seed": 1, "variation_strength": True}, ["variation_strength is True"]),
        ({"variation_strength": 0.5}, ["0.5", "no variation_seed"]),
    ],
)
def test_bad_input(given: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        noise_of(**({"seed": 0, "shape": SHAPE} | given))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_seeds_and_rows_that_cannot_be() -> None:
    assert checked_seed(np.int64(3)) == 3 and type(checked_seed(np.int64(3))) is int
    for count in (1, 0, 2.0, True):
        with pytest.raises(InputError, match="row"):
            strengths(count)  # type: ignore[arg-type]
