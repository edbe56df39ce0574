"""The objective: at which noise levels the network is trained, and what an error counts there.

The coordinate is x = x0 + sigma * noise (Karras et al. 2022, arXiv:2206.00364). A level is a function of u in [0, 1),
so that u may be drawn, or spread evenly. A weight is of the squared error of the network's own output; it follows from
the weight of the squared error of x0 by x0 = c_skip * x + c_out * output. Levels and weights are float64 [B].
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion_unet.errors import InputError
from diffusion_unet.schedule import NoiseSchedule, match_shape

from .config import ObjectiveConfig
from .imports import load_object

SNR_GAMMA = 5.0  # Hang et al. 2023, section 4.2
LN_SIGMA = (-0.6, 1.2)  # mean and standard deviation, for data of unit variance
HUBER_C = 0.1
ROUNDING = 1e-6  # relative; a level this little outside the schedule's range is at its end


def noise_levels(
    u: Tensor, schedule: NoiseSchedule, config: ObjectiveConfig, pixels: Tensor | float | None = None
) -> Tensor:
    """sigma [B] for u [B] in [0, 1), by the distribution that the settings name, within the schedule's range.

    pixels: height * width of the images, a number or [B]; needed with `resolution_shift`, which multiplies sigma by
    sqrt(pixels) / resolution_shift: an average over n^2 pixels has n times less noise, so that a larger image needs
    more for as much to be hidden (Hoogeboom et al. 2023, arXiv:2301.11093; Esser et al. 2024,
    arXiv:2403.03206, section 5.3.2). What would leave the range is cut off the distribution; of a function of the
    user's own it is moved to the end of the range. Raises InputError for such a function."""
    u, factor = u.double(), _shift(config, pixels)
    match config.noise_distribution:
        case "uniform":
            return uniform_timestep(u, schedule, factor)
        case "lognormal" | "logit_normal":
            # logit(s) of a flow's time s = sigma / (1 + sigma) is ln sigma: two names of one distribution
            mean = LN_SIGMA[0] if config.ln_sigma_mean is None else config.ln_sigma_mean
            std = LN_SIGMA[1] if config.ln_sigma_std is None else config.ln_sigma_std
            return lognormal(u, mean + factor.log(), std, schedule.sigma_min, schedule.sigma_max)
        case _:
            return (_own_levels(u, schedule, config) * factor).clamp(schedule.sigma_min, schedule.sigma_max)


def _shift(config: ObjectiveConfig, pixels: Tensor | float | None) -> Tensor:
    """What sigma is multiplied by, [] or [B]."""
    if config.resolution_shift is None:
        return torch.ones((), dtype=torch.float64)
    if pixels is None:
        raise ValueError("with resolution_shift, the number of pixels is needed")
    return torch.as_tensor(pixels, dtype=torch.float64).sqrt() / config.resolution_shift


def uniform_timestep(u: Tensor, schedule: NoiseSchedule, factor: Tensor | float = 1.0) -> Tensor:
    """Timesteps evenly between those of the lowest and the highest sigma, fractional (Ho et al. 2020,
    arXiv:2006.11239); sigma then multiplied by `factor`, without the timesteps that would leave the range."""
    low, high = schedule.sigma_min, schedule.sigma_max
    ends = torch.tensor([[low], [high]], dtype=torch.float64) / factor
    first, last = schedule.timestep(ends.clamp(low, high))
    return (schedule.sigma(first + u.double() * (last - first)) * factor).clamp(low, high)


def lognormal(u: Tensor, mean: Tensor | float, std: float, low: float, high: float) -> Tensor:
    """ln sigma ~ N(mean, std^2), cut off outside [low, high], by the inverse of its distribution function; mean [B] or
    a number.

    Karras et al. 2022, table 1. With sigma = s / (1 - s), a flow's logit-normal s (Esser et al. 2024, eq. 19) is the
    same distribution."""
    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    cdf_low, cdf_high = torch.special.ndtr((ends.log() - mean) / std)
    z = torch.special.ndtri(cdf_low + u.double() * (cdf_high - cdf_low))
    return (mean + std * z).exp().clamp(low, high)


def _own_levels(u: Tensor, schedule: NoiseSchedule, config: ObjectiveConfig) -> Tensor:
    """sigma [B] by a function of the user's own, f(u [B], schedule, **noise_args). Raises InputError, unless it takes
    the arguments and gives as many numbers within the schedule's range."""
    path, key = config.noise_distribution, "objective.noise_distribution"
    function = load_object(path, key)
    if not callable(function):
        raise InputError(f"{key}: {path} is not a function")
    arguments = config.noise_args or {}
    _check_arguments(function, path, u, schedule, arguments)
    sigma = function(u, schedule, **arguments)
    if not (isinstance(sigma, Tensor) and sigma.is_floating_point() and sigma.shape == u.shape):
        got = f"{sigma.dtype} {list(sigma.shape)}" if isinstance(sigma, Tensor) else type(sigma).__name__
        raise InputError(f"{key}: {path} must give a floating-point tensor {list(u.shape)}, as u is; it gave {got}")
    sigma, low, high = sigma.detach().to("cpu", torch.float64), schedule.sigma_min, schedule.sigma_max
    wrong = sigma[~((sigma >= low * (1 - ROUNDING)) & (sigma <= high * (1 + ROUNDING)))]
    if len(wrong):
        raise InputError(f"{key}: {path} gave sigma {wrong[0]:g}; the schedule has sigmas from {low:g} to {high:g}")
    return sigma


def _check_arguments(
    function: Callable[..., Any], path: str, u: Tensor, schedule: NoiseSchedule, arguments: dict[str, Any]
) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, and its arguments cannot be looked up
        return
    try:
        signature.bind(u, schedule, **arguments)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise InputError(
            f"objective.noise_args: {path} takes ({names}), not (u, schedule, **noise_args): {error}"
        ) from None


def loss_weight(sigma: Tensor, schedule: NoiseSchedule, config: ObjectiveConfig) -> Tensor:
    """Weight [B] of the squared error of the network's output, by the settings."""
    gamma = SNR_GAMMA if config.snr_gamma is None else config.snr_gamma
    match config.weighting:
        case "min_snr":
            return min_snr(sigma, schedule, gamma)
        case "soft_min_snr":
            return soft_min_snr(sigma, schedule, gamma)
        case "edm":
            return edm(sigma, schedule)
        case _:
            return torch.ones_like(sigma, dtype=torch.float64)


# SNR = (sigma_data / sigma)^2. The weights are written with c_out and sigma, not with the SNR: nothing is divided by
# it, so that they are finite where it is zero.


def min_snr(sigma: Tensor, schedule: NoiseSchedule, gamma: float) -> Tensor:
    """min(SNR, gamma) / sigma_data^2 on x0 (Hang et al. 2023, arXiv:2303.09556): for data of unit variance
    min(SNR, gamma) / SNR for epsilon and / (SNR + 1) for v."""
    sigma, c_out = sigma.double(), schedule.scaling(sigma).c_out
    return torch.minimum((c_out / sigma) ** 2, gamma * (c_out / schedule.sigma_data) ** 2)


def soft_min_snr(sigma: Tensor, schedule: NoiseSchedule, gamma: float) -> Tensor:
    """1 / (1/SNR + 1/gamma) / sigma_data^2 on x0, which is between half of min-SNR and min-SNR, without its corner.

    Crowson et al. 2024 (arXiv:2401.11605) have 1 / (sigma^2 + 1/4) for data of sigma_data 0.5, which is gamma 1."""
    corner = torch.tensor(schedule.sigma_data / math.sqrt(gamma), dtype=torch.float64)
    return (schedule.scaling(sigma).c_out / torch.hypot(sigma.double(), corner)) ** 2


def edm(sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 (Karras et al. 2022, table 1): 1 for the edm and v
    predictions."""
    c_out = schedule.scaling(sigma).c_out
    return (c_out / sigma.double()) ** 2 + (c_out / schedule.sigma_data) ** 2


def huber_c(config: ObjectiveConfig) -> float | None:
    """The `huber` that `image_losses` takes; None for the mean squared error."""
    if config.loss == "mse":
        return None
    return HUBER_C if config.huber_c is None else config.huber_c


def image_losses(output: Tensor, target: Tensor, weight: Tensor, huber: float | None = None) -> Tensor:
    """Weighted loss of each image: output and target [B, C, H, W], weight [B] -> float32 or wider [B].

    The mean over elements of d^2, d = output - target, or with `huber` c of the pseudo-Huber loss
    2c (sqrt(d^2 + c^2) - c): d^2 far below c, 2c |d| far above (Song and Dhariwal 2023, arXiv:2310.14189, section 3.3,
    element by element and 2c times it)."""
    wide = torch.promote_types(output.dtype, torch.float32)
    error = (output.to(wide) - target.to(wide)).square()
    if huber is not None:
        # 2c (r - c) = 2c d^2 / (r + c), in which nothing cancels
        error = error * (2 * huber / ((error + huber**2).sqrt() + huber))
    mean = error.flatten(1).mean(dim=1)
    return mean * match_shape(weight, mean)


def offset_noise(noise: Tensor, offset_normals: Tensor, amount: float) -> Tensor:
    """noise [B, C, H, W] + amount * offset_normals [B, C], the same number in all of a channel (Guttenberg 2023,
    "Diffusion with offset noise"): its mean then hides the image's, so that the network learns that too."""
    return noise + amount * offset_normals[:, :, None, None].to(noise)
