"""Averages of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """An exponential moving average: average <- average + (1 - d_n) (parameter - average) after step n.

    d_n = min(decay, (1 + n) / (10 + n)), so that the first steps, far from the end, are soon forgotten. `name` says
    which average it is, in files and on the command line.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.name = f"{decay:g}"
        self.decay = decay
        self._names = list(parameters)
        self._live = list(parameters.values())
        self._average = [tensor.detach().clone() for tensor in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [tensor.detach() for tensor in self._live], 1 - decay)

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
