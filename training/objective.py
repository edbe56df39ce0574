"""The objective: at which noise levels the network is trained, and what an error counts there.

The coordinate is x = x0 + sigma * noise (Karras et al. 2022, arXiv:2206.00364). A level is a function of u in (0, 1),
so that u may be drawn, or spread evenly. A weight is of the squared error of the network's own output; it follows from
the weight of the squared error of x0 by x0 = c_skip * x + c_out * output. Everything is float64 [B].
"""

import torch
from torch import Tensor

from diffusion_unet.schedule import NoiseSchedule, match_shape

from .config import ObjectiveConfig

SNR_GAMMA = 5.0  # Hang et al. 2023, section 4.2
LN_SIGMA = (-0.6, 1.2)  # mean and standard deviation, for data of unit variance


def noise_levels(u: Tensor, schedule: NoiseSchedule, config: ObjectiveConfig) -> Tensor:
    """sigma [B] for u [B] in [0, 1), by the distribution that the settings name, within the schedule's range."""
    if config.noise_distribution == "uniform":
        return uniform_timestep(u, schedule)
    mean = LN_SIGMA[0] if config.ln_sigma_mean is None else config.ln_sigma_mean
    std = LN_SIGMA[1] if config.ln_sigma_std is None else config.ln_sigma_std
    return lognormal(u, mean, std, schedule.sigma_min, schedule.sigma_max)


def uniform_timestep(u: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Timesteps evenly between those of the lowest and the highest sigma, fractional (Ho et al. 2020,
    arXiv:2006.11239)."""
    low, high = (schedule.timestep(sigma) for sigma in (schedule.sigma_min, schedule.sigma_max))
    return schedule.sigma(low + u.double() * (high - low))


def lognormal(u: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """ln sigma ~ N(mean, std^2), cut off outside [low, high], by the inverse of its distribution function.

    Karras et al. 2022, table 1. With sigma = t / (1 - t), a flow's logit-normal t (Esser et al. 2024, arXiv:2403.03206,
    eq. 19) is the same distribution."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    cdf_low, cdf_high = torch.special.ndtr((ends.log() - mean) / std)
    z = torch.special.ndtri(cdf_low + u.double() * (cdf_high - cdf_low))
    return (mean + std * z).exp().clamp(low, high)


def loss_weight(sigma: Tensor, schedule: NoiseSchedule, config: ObjectiveConfig) -> Tensor:
    """Weight [B] of the squared error of the network's output, by the settings."""
    if config.weighting == "min_snr":
        return min_snr(sigma, schedule, SNR_GAMMA if config.snr_gamma is None else config.snr_gamma)
    if config.weighting == "edm":
        return edm(sigma, schedule)
    return torch.ones_like(sigma)


def min_snr(sigma: Tensor, schedule: NoiseSchedule, gamma: float) -> Tensor:
    """min(SNR, gamma) on x0 (Hang et al. 2023, arXiv:2303.09556): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.

    Written with c_out, which is finite where the SNR is zero."""
    variance = schedule.sigma_data**2
    snr = variance / sigma.double() ** 2
    return snr.clamp(max=gamma) * schedule.scaling(sigma).c_out ** 2 / variance


def edm(sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 (Karras et al. 2022, table 1): 1 for the edm and v
    predictions."""
    sigma, data = sigma.double(), schedule.sigma_data
    return (sigma**2 + data**2) / (sigma * data) ** 2 * schedule.scaling(sigma).c_out ** 2


def image_losses(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared error of each image: output and target [B, C, H, W], weight [B] -> float32 or wider [B]."""
    wide = torch.promote_types(output.dtype, torch.float32)
    error = (output.to(wide) - target.to(wide)).square().flatten(1).mean(dim=1)
    return error * match_shape(weight, error)
