"""Which averages of the weights a run keeps, by name: "0.9999", "constant-0.999", "power-0.05".

Nothing here imports torch, so that a name is checked with the other settings.
"""

import math
import re
from dataclasses import dataclass

from diffusion_unet.errors import InputError

NAME = re.compile(r"(?:(constant|power)-)?([0-9]*\.?[0-9]+)")
WIDEST = 1 / math.sqrt(12)  # relative width of the plain mean of all steps, for which gamma is 0


@dataclass(frozen=True)
class Average:
    """average <- decay(n) * average + (1 - decay(n)) * parameter, after each optimizer step n = 1, 2, ..."""

    name: str
    kind: str  # warmed, constant or power
    number: float  # the decay; for power the exponent gamma

    def decay(self, step: int) -> float:
        """What remains of the average at optimizer step `step`, counted from 1.

        warmed: min(decay, (1 + n) / (10 + n)), so that the first steps, far from the end, are soon forgotten.
        power: (1 - 1/n)^(gamma + 1), so that step n has a share of n^gamma (Karras et al. 2024, arXiv:2312.02696,
        section 3.1)."""
        if self.kind == "power":
            return (1 - 1 / step) ** (self.number + 1)
        return min(self.number, (1 + step) / (10 + step)) if self.kind == "warmed" else self.number


def parse(name: str) -> Average:
    """The average of that name: "0.9999" warmed, "constant-0.999", or "power-0.05", whose width is 0.05 of the run.

    Raises InputError for another name, a decay outside (0, 1), and a width outside (0, 0.2886]."""
    match = NAME.fullmatch(name)
    if match is None:
        raise InputError(f"train.ema: {name!r} is not a decay such as 0.9999, constant-0.999, or power-0.05")
    kind, number = match[1] or "warmed", float(match[2])
    if kind == "power":
        if not 0 < number <= WIDEST:
            raise InputError(
                f"train.ema: the width of {name} must be above 0 and at most 0.2886 (the mean of all steps)"
            )
        return Average(name, kind, power_exponent(number))
    if not 0 < number < 1:
        raise InputError(f"train.ema: the decay of {name} must lie between 0 and 1, both excluded")
    return Average(name, kind, number)


def power_exponent(width: float) -> float:
    """gamma for which t^gamma on 0 < t < 1 has the standard deviation `width`, in (0, 1/sqrt(12)].

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic; of its roots the largest (Karras et al. 2024,
    algorithm 2)."""
    import numpy as np  # late, as `--help` reads the settings and waits for no more than it needs

    t = width**-2
    return max(0.0, float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))
