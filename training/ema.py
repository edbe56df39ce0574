"""Averages of the weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .averages import parse


def make_emas(names: Sequence[str], parameters: Mapping[str, Tensor]) -> list["EMA"]:
    """An average of the parameters for each name, in order; the names as `averages.parse` takes them."""
    return [EMA(parameters, name) for name in names]


class EMA:
    """A moving average: average <- average + (1 - d_n) (parameter - average) after step n; d_n by the name.

    `name` says which average it is, in files and on the command line: "0.9999" (warmed), "constant-0.999" or
    "power-0.05", as `averages.parse` explains. Raises InputError for another.
    """

    def __init__(self, parameters: Mapping[str, Tensor], name: str):
        self.name = name
        self._decay = parse(name).decay
        self._names = list(parameters)
        self._live = list(parameters.values())
        self._average = [tensor.detach().clone() for tensor in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters after optimizer step `step`, counted from 1."""
        torch._foreach_lerp_(self._average, [tensor.detach() for tensor in self._live], 1 - self._decay(step))

    def state(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters; the very tensors, not copies."""
        return dict(zip(self._names, self._average, strict=True))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the parameters hold the averages; afterwards what they held before, also when an error is
        raised."""
        live = [tensor.detach() for tensor in self._live]
        before = [tensor.clone() for tensor in live]
        torch._foreach_copy_(live, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(live, before)
