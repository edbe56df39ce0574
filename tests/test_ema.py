"""Averages of the weights, against the recurrence written out."""

import pytest
import torch

from training.ema import EMA


def parameters() -> dict[str, torch.nn.Parameter]:
    return {
        "a": torch.nn.Parameter(torch.zeros(3)),
        "b": torch.nn.Parameter(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)),
    }


def test_recurrence_with_warm_up() -> None:
    live = parameters()
    ema = EMA(live, 0.6)
    expected = {name: tensor.detach().double() for name, tensor in live.items()}
    torch.manual_seed(0)
    for step in range(1, 30):
        with torch.no_grad():
            for tensor in live.values():
                tensor.copy_(torch.randn(tensor.shape))
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, tensor in live.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.detach().double()
    for name, average in ema.state().items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_of_what_stays_is_what_stays() -> None:
    live = parameters()
    ema = EMA(live, 0.9)
    ema.update(1)
    assert all(torch.equal(ema.state()[name], tensor) for name, tensor in live.items())
    assert ema.name == "0.9" and EMA(live, 0.9999).name == "0.9999"


def test_swapping_in_and_back_also_after_an_error() -> None:
    live = parameters()
    ema = EMA(live, 0.5)
    with torch.no_grad():
        live["a"].fill_(8.0)
    ema.update(100)
    with pytest.raises(RuntimeError, match="drawing failed"), ema.swapped_in():
        assert live["a"].tolist() == [4.0] * 3
        assert ema.state()["a"].tolist() == [4.0] * 3
        raise RuntimeError("drawing failed")
    assert live["a"].tolist() == [8.0] * 3
    assert ema.state()["a"].tolist() == [4.0] * 3
