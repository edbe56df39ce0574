"""Any of diffusers' schedulers in the project's own loop: `run(wrap(scheduler, steps), x, denoise, noise)`.

The network is not asked through the scheduler: the denoiser says x0 at a noise level, and the output that the
scheduler expects is made of that. So a scheduler serves a model of any prediction type, whatever its own is.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_unet.errors import InputError

from .levels import check_steps
from .solvers import Noise, Step

# Of what x = x0 + sigma n is multiplied by in a scheduler's own coordinate; names end in "Scheduler".
_PRESERVING = "DDIM DDIMParallel DDPM DDPMParallel PNDM LCM TCD DPMSolverMultistep DPMSolverSinglestep UniPCMultistep"
_PRESERVING += " DEISMultistep SASolver"  # 1 / sqrt(1 + sigma^2)
_EXPLODING = "EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete KDPM2Discrete KDPM2AncestralDiscrete"
_EXPLODING += " EDMEuler EDMDPMSolverMultistep"  # 1
_FLOW = "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM"  # 1 / (1 + sigma)
KNOWN = tuple(f"{name}Scheduler" for name in f"{_PRESERVING} {_EXPLODING} {_FLOW}".split())

# The levels of pure noise, where sigma is infinite, as diffusers has them elsewhere: abar of a zero-SNR table, s of a
# flow. The scheduler's own arithmetic keeps its exact value.
MIN_ABAR, MAX_S = 2.0**-24, 1 - 1e-6


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A course (see `solvers.Course`) whose steps are a scheduler's; made by `wrap`."""

    sigma: Tensor  # float64 [N] noise level at which the network is asked
    scale: Tensor  # [N] from x = x0 + sigma n to the scheduler's coordinate
    of_x: Tensor  # [N] the output that the scheduler expects is of_x * x + of_denoised * D
    of_denoised: Tensor  # [N]
    scheduler: Any  # its timesteps set, and no step taken

    def begin(self) -> Step:
        scheduler = copy.deepcopy(self.scheduler)  # schedulers keep the history of a trajectory in themselves
        timesteps, draws = scheduler.timesteps, itertools.count(1)
        back = [*(1 / self.scale[1:]).tolist(), 1.0]  # what comes out of the last step is the picture
        rows = list(zip(self.scale.tolist(), self.of_x.tolist(), self.of_denoised.tolist(), back, strict=True))

        def step(row: int, x: Tensor, denoised: Tensor, noise: Noise) -> Tensor:
            scale, of_x, of_denoised, unscale = rows[row]
            output = torch.add(of_x * x, denoised, alpha=of_denoised)
            sample = x if scale == 1 else scale * x
            with _Draws(lambda: noise(next(draws))):
                if hasattr(scheduler, "scale_model_input"):  # some warn when they step before it was called
                    scheduler.scale_model_input(sample, timesteps[row])
                sample = _refusing(scheduler, lambda: scheduler.step(output, timesteps[row], sample)[0])
            return sample if unscale == 1 else unscale * sample

        return step


class _Draws(TorchFunctionMode):
    """Within it `torch.randn`, from which every scheduler here draws, is the trajectory's own noise.

    A mode holds for the thread that enters it, so that others may draw meanwhile.
    """

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return self._draw().to(dtype=kwargs and kwargs.get("dtype"))
        return func(*args, **(kwargs or {}))


def wrap(scheduler: Any, steps: int | None = None) -> Wrapped:
    """What runs a diffusers scheduler in `run`, with noise from there instead of a generator. The scheduler is copied.

    steps: as its `set_timesteps` counts them; None takes the timesteps that it has been set to, by whatever arguments.

    At timesteps of pure noise (zero SNR, s = 1 of a flow), where sigma is infinite, the network is asked at 4096 and at
    s = 1 - 1e-6, as the rest of diffusers does.

    Raises InputError for a class that is not known here (`KNOWN`), for variances that the network would have to
    predict, and for what the scheduler itself refuses.
    """
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    if not names & set(KNOWN):
        raise InputError(f"scheduler {type(scheduler).__name__} cannot be wrapped: {', '.join(KNOWN)} can")
    if str(scheduler.config.get("variance_type") or "").startswith("learned"):
        raise InputError(f"scheduler {type(scheduler).__name__}: a variance that the network predicts is not supported")
    scheduler = copy.deepcopy(scheduler)
    if steps is not None:
        check_steps(steps)
        _refusing(scheduler, lambda: scheduler.set_timesteps(steps))
    if getattr(scheduler, "num_inference_steps", None) is None and not getattr(scheduler, "custom_timesteps", False):
        raise InputError(f"scheduler {type(scheduler).__name__} has no timesteps yet: give the number of steps")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks for the first timestep, and takes the second of two like it
    sigma, flow = _levels(scheduler, names)
    if not (sigma > 0).all():
        raise InputError(f"scheduler {type(scheduler).__name__}: one of its steps starts at sigma 0: take fewer steps")
    alpha = 1 / (1 + sigma) if flow else (1 + sigma**2).rsqrt()
    exploding = names & {f"{name}Scheduler" for name in _EXPLODING.split()}
    return Wrapped(sigma, torch.ones_like(sigma) if exploding else alpha, *_output(scheduler, sigma, alpha), scheduler)


def _levels(scheduler: Any, names: set[str]) -> tuple[Tensor, bool]:
    """sigma float64 [N] of the timesteps, and whether the scheduler's own are those of a flow."""
    rows = len(scheduler.timesteps)
    if not hasattr(scheduler, "sigmas"):
        abar = scheduler.alphas_cumprod[scheduler.timesteps.cpu()].double()
        return (1 / abar.clamp_min(MIN_ABAR) - 1).sqrt(), False
    level = scheduler.sigmas[:rows].double()
    if hasattr(scheduler, "sigmas_interpol"):  # every second pass is half-way
        lag = 1 if "KDPM2AncestralDiscreteScheduler" in names else 0
        level[1::2] = scheduler.sigmas_interpol[1 - lag : rows - lag : 2].double()
    if scheduler.config.get("use_flow_sigmas") or names & {f"{name}Scheduler" for name in _FLOW.split()}:
        s = level.clamp_max(MAX_S)
        return s / (1 - s), True
    return level, False


def _output(scheduler: Any, sigma: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of x and D in the output that the scheduler expects, from what it makes x0 of."""
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if hasattr(scheduler, "precondition_outputs"):  # EDM: D = c_skip x + c_out F
        one = torch.ones_like(sigma)
        c_skip = scheduler.precondition_outputs(one, 0 * one, sigma)
        c_out = scheduler.precondition_outputs(0 * one, one, sigma)
        return -c_skip / c_out, 1 / c_out
    match prediction:
        case "epsilon":
            return 1 / sigma, -1 / sigma
        case "v_prediction":  # alpha n - sigma alpha x0
            return alpha / sigma, -1 / (alpha * sigma)
        case "flow_prediction":  # n - x0
            return 1 / sigma, -(1 + sigma) / sigma
        case "sample" | "original_sample":
            return torch.zeros_like(sigma), torch.ones_like(sigma)
    raise InputError(f"scheduler {type(scheduler).__name__}: its prediction_type is {ascii(prediction)[:80]}")


def _refusing(scheduler: Any, work: Callable[[], Any]) -> Any:
    """What `work` returns; what the scheduler does not take, in one line."""
    try:
        return work()
    except (ValueError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"scheduler {type(scheduler).__name__}: {first[:200]}") from None
