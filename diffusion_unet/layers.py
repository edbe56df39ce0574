"""The convolutional half of the U-Net: embeddings of time, the residual block, down- and upsampling.

Shapes: B batch, C channels, H and W image, E width of the embedding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UNetConfig

# What a residual block reads: the embedding [B, E], or each block's own projection of it, computed beforehand.
Embedding = Tensor | tuple[Tensor, ...]


class Timesteps(nn.Module):
    """Sines and cosines of geometrically spaced frequencies (Vaswani et al. 2017; Ho et al. 2020); no parameters.

    [N] numbers, fractional ones too -> [N, dim] in float32 whatever their type: the released weights were trained so.
    An odd `dim` ends with a zero.
    """

    def __init__(self, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> None:
        super().__init__()
        self.dim, self.flip_sin_to_cos, self.freq_shift = dim, flip_sin_to_cos, freq_shift

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        # In this order of operations float32 rounds as it did when the released weights were trained.
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * (exponents / (half - self.freq_shift)).exp()
        parts = [angles.cos(), angles.sin()] if self.flip_sin_to_cos else [angles.sin(), angles.cos()]
        return F.pad(torch.cat(parts, dim=-1), (0, self.dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers around a SiLU: [B, in_dim] -> [B, out_dim]; `condition` [B, cond_dim] is added to the input."""

    def __init__(self, in_dim: int, out_dim: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, in_dim, bias=False)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock2D(nn.Module):
    """norm, SiLU, conv, time, norm, SiLU, conv, and the residual: [B, in_channels, H, W] -> [B, out_channels, H, W].

    Time comes in as a shift of the hidden activations (Ho et al. 2020) or as a scale and a shift of the normalised
    ones (`scale_shift`; Dhariwal & Nichol 2021).
    """

    slot = 0  # position of this block's projection in a precomputed embedding

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, output_scale_factor: float = 1) -> None:
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.output_scale_factor = output_scale_factor
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.block_embed_dim, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Embedding) -> Tensor:
        """`emb` has passed its SiLU already, which all blocks share."""
        time = (emb[self.slot] if isinstance(emb, tuple) else self.time_emb_proj(emb))[:, :, None, None]  # 1 or B rows
        h = self.conv1(F.silu(self.norm1(x)))
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + h) if self.output_scale_factor == 1 else (x + h) / self.output_scale_factor


class Downsample2D(nn.Module):
    """Convolution of stride 2: [B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)], or floor with `padding` 0."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest neighbour to `size`, then a convolution: [B, C, H, W] -> [B, C, *size].

    The size is that of the skip connection to be joined, so that images of every size come back as they went in.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
