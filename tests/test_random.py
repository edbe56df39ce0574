"""Philox against Random123's known answers; addresses, moments, and independence of how numbers are asked for."""

import math
import time

import numpy as np
import pytest
import torch

from diffusion_unet.errors import InputError
from diffusion_unet.random import Purpose, normal, permutation, philox, uniform

# kat_vectors of Random123, philox4x32 10: counter, key, answer
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    counters = np.array(words(counter), dtype=np.uint64)[:, None].repeat(3, 1)
    low, high = words(key)
    assert philox(counters, (low, high)).T.tolist() == [words(answer)] * 3


def test_the_address_of_a_number() -> None:
    """Counter (block, purpose and draw, index low, index high), key (seed low, seed high): the format, from outside."""
    seed, index, draw = 0x0123456789ABCDEF, 0xFEDCBA9876543210, 0x00ABCDEF
    counter = np.array([[1], [Purpose.PICTURE << 24 | draw], [0x76543210], [0xFEDCBA98]], dtype=np.uint64)
    w0, w1, w2, w3 = (int(word) for word in philox(counter, (0x89ABCDEF, 0x01234567))[:, 0])
    second_block = uniform(seed, Purpose.PICTURE, index, 4, draw)[0, 2:]
    expected = [((w0 >> 5) * 2**26 + (w1 >> 6)) / 2**53, ((w2 >> 5) * 2**26 + (w3 >> 6)) / 2**53]
    assert second_block.tolist() == expected
    radius, angle = math.sqrt(-2 * math.log((w0 + 0.5) / 2**32)), 2 * math.pi * w1 / 2**32
    pair = normal(seed, Purpose.PICTURE, index, (8,), draw)[0, 4:6]
    torch.testing.assert_close(pair, torch.tensor([radius * math.cos(angle), radius * math.sin(angle)]))


def test_purposes_are_fixed_numbers() -> None:
    names = ["ORDER", "CAPTION", "DROP", "CROP", "FLIP", "NOISE", "SIGMA", "PICTURE", "BATCH", "TAGS", "MASK"]
    assert {purpose.name: int(purpose) for purpose in Purpose} == {name: i for i, name in enumerate(names)}


def test_batching_changes_nothing() -> None:
    for seed in (0, 12345, 2**64 - 1):
        together = normal(seed, Purpose.NOISE, [3, 7, 2**40], (3, 17, 5))
        for row, index in zip(together, (3, 7, 2**40), strict=True):
            assert torch.equal(row, normal(seed, Purpose.NOISE, index, (3, 17, 5))[0])
        assert torch.equal(together[0].flatten()[:9], normal(seed, Purpose.NOISE, [3], (9,))[0])
        rows = uniform(seed, Purpose.CROP, range(100), 3)
        assert torch.equal(rows[41], uniform(seed, Purpose.CROP, 41, 3)[0])
        assert torch.equal(rows[:, :1], uniform(seed, Purpose.CROP, range(100)))


def test_shapes_and_types() -> None:
    assert uniform(1, Purpose.DROP, []).shape == (0, 1)
    assert uniform(1, Purpose.DROP, 5, 3).shape == (1, 3) and uniform(1, Purpose.DROP, 5).dtype == torch.float64
    assert normal(1, Purpose.NOISE, [1, 2], (1, 5, 5)).shape == (2, 1, 5, 5)
    assert normal(1, Purpose.NOISE, 1, (2,)).dtype == torch.float32
    assert normal(1, Purpose.NOISE, [], (2, 3)).shape == (0, 2, 3)
    assert normal(1, Purpose.NOISE, [1], ()).shape == (1,)


def test_moments() -> None:
    x = normal(7, Purpose.NOISE, range(200), (5000,)).double()
    n = x.numel()
    # four standard errors of each moment of N(0, 1)
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 4 / math.sqrt(n)
    assert abs((x[1:] * x[:-1]).mean()) < 4 / math.sqrt(n)
    u = uniform(7, Purpose.SIGMA, range(1000), 1000)
    assert 0 <= u.min() < 1e-5 and 1 - 1e-5 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.numel())
    counts = torch.histc(u, 100, 0, 1)
    chi2 = ((counts - u.numel() / 100) ** 2).sum() / (u.numel() / 100)
    assert 45 < chi2 < 170  # 99 degrees of freedom


def test_addresses_do_not_collide() -> None:
    """Every number of different seeds, purposes, indices, draws and positions is another one."""
    parts = [
        uniform(seed, purpose, [0, 1, 2**32, 2**32 + 1], 20, draw)
        for seed in (0, 1, 2**32)
        for purpose in Purpose
        for draw in (0, 1, 2, 2**24 - 1)
    ]
    values = torch.stack(parts).flatten()
    assert len(values.unique()) == len(values) == 3 * 11 * 4 * 4 * 20


def test_permutation() -> None:
    first = permutation(3, 0, 1000)
    assert first.dtype == torch.int64 and torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, permutation(3, 0, 1000))
    assert not torch.equal(first, permutation(3, 1, 1000))
    assert not torch.equal(first, permutation(4, 0, 1000))
    # every element is as likely at the first place: chi-square with 9 degrees of freedom
    counts = torch.bincount(torch.stack([permutation(0, epoch, 10)[0] for epoch in range(2000)]), minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 30


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"draw": 2**24}, "draw"),
        ({"indices": [0, -3]}, "index"),
        ({"indices": 2**64}, "index"),
    ],
)
def test_out_of_range(arguments: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        normal(**({"seed": 0, "purpose": Purpose.NOISE, "indices": 0, "shape": (2,)} | arguments))


def test_speed() -> None:
    normal(0, Purpose.NOISE, range(64), (1, 32, 32))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        normal(0, Purpose.NOISE, range(64), (1, 32, 32))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05  # about 4 ms; the margin is for a busy machine
