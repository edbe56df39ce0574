"""How large the loss usually is at a noise level, learned on the way (Karras et al. 2024, arXiv:2312.02696)."""

import math

import torch
from torch import Tensor, nn

from diffusion_unet.random import Purpose, normal, uniform

FEATURES = 128
SEED = 2312_02696  # of the features alone: any, but always the same


class Uncertainty(nn.Module):
    """u(sigma), which learns ln E[loss | sigma] when `weigh` is minimised, so that every noise level counts alike
    (equations 14 and 15).

    Fourier features of ln(sigma) / 4, weighted and summed, with weights of zero at first: training starts unweighted.
    The frequencies follow from the code and are no part of the state. It is trained with the network, and of no use
    afterwards.
    """

    frequencies: Tensor  # [FEATURES]
    phases: Tensor  # [FEATURES]

    def __init__(self) -> None:
        super().__init__()
        frequencies, phases = normal(SEED, Purpose.SIGMA, 0, (FEATURES,)), uniform(SEED, Purpose.SIGMA, 1, FEATURES)
        self.register_buffer("frequencies", 2 * math.pi * frequencies[0], persistent=False)
        self.register_buffer("phases", 2 * math.pi * phases[0].float(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(FEATURES))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, sigma: Tensor) -> Tensor:
        """u [B], float32 also under autocast, for sigma [B] > 0 on any device."""
        c_noise = (sigma.log() / 4).to(self.weight)
        features = math.sqrt(2) * (c_noise[:, None] * self.frequencies + self.phases).cos()  # [B, FEATURES]
        # a product of matrices would be rounded to half precision under autocast
        return (features * self.weight).sum(dim=1) + self.bias


def weigh(losses: Tensor, u: Tensor) -> Tensor:
    """losses / exp(u) + u, each [B], which is least for exp(u) = E[loss] (equation 14); negative where loss < 1."""
    return losses * (-u).exp() + u
