"""The down, mid and up blocks: residual blocks, each followed by a transformer where the level has attention.

Shapes: B batch, C channels, H and W image. `emb` and `context` go through to the layers as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import Context, Transformer2DModel, repeated
from .config import Level, UNetConfig
from .layers import Downsample2D, Embedding, ResnetBlock2D, Upsample2D


class DownBlock2D(nn.Module):
    """[B, in_channels, H, W] -> [B, C, H/2, W/2] (H, W on the last level), and every output for the skips."""

    def __init__(self, config: UNetConfig, level: Level, in_channels: int) -> None:
        super().__init__()
        self.attentions, self.resnets = nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(level.depths):
            self.resnets.append(ResnetBlock2D(config, level.channels if i else in_channels, level.channels))
            if depth:
                self.attentions.append(Transformer2DModel(config, level, depth))
        downsample = [Downsample2D(level.channels, config.downsample_padding)] if level.resample else []
        self.downsamplers = nn.ModuleList(downsample)

    def forward(
        self,
        x: Tensor,
        emb: Embedding,
        context: Context | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`residual`, of a T2I-Adapter, joins before the downsampling where there is attention, behind it elsewhere."""
        outputs: list[Tensor] = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[i](x, context, bias)
                if residual is not None and i == len(self.resnets) - 1:
                    x = x + residual
            outputs.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            outputs.append(x)
        if residual is not None and not self.attentions:
            x = outputs[-1] = x + residual
        return x, outputs


class CrossAttnDownBlock2D(DownBlock2D):
    """A down block with attention, under the name by which tools look for it."""


class UNetMidBlock2D(nn.Module):
    """Residual block, and with attention also transformer and residual block: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, config: UNetConfig, level: Level) -> None:
        super().__init__()
        scale = config.mid_block_scale_factor
        self.attentions = nn.ModuleList()
        self.resnets = nn.ModuleList([ResnetBlock2D(config, level.channels, level.channels, scale)])
        for depth in level.depths:
            self.attentions.append(Transformer2DModel(config, level, depth))
            self.resnets.append(ResnetBlock2D(config, level.channels, level.channels, scale))

    def forward(self, x: Tensor, emb: Embedding, context: Context | None = None, bias: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, emb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, context, bias), emb)
        return x


class UNetMidBlock2DCrossAttn(UNetMidBlock2D):
    """A mid block with attention, under the name by which tools look for it."""


class UpBlock2D(nn.Module):
    """Joins one skip before each residual block: [B, in_channels, H, W] -> [B, C, *size]."""

    def __init__(self, config: UNetConfig, level: Level, in_channels: int, skip_channels: Sequence[int]) -> None:
        super().__init__()
        self.attentions, self.resnets = nn.ModuleList(), nn.ModuleList()
        for i, (depth, skip) in enumerate(zip(level.depths, reversed(skip_channels), strict=True)):
            self.resnets.append(ResnetBlock2D(config, (level.channels if i else in_channels) + skip, level.channels))
            if depth:
                self.attentions.append(Transformer2DModel(config, level, depth))
        self.upsamplers = nn.ModuleList([Upsample2D(level.channels)] if level.resample else [])

    def forward(
        self,
        x: Tensor,
        skips: Sequence[Tensor],
        emb: Embedding,
        context: Context | None = None,
        bias: Tensor | None = None,
        size: torch.Size | None = None,
    ) -> Tensor:
        """`skips`: as many as residual blocks, the last joins first; `size`: of the level that comes next."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = resnet(torch.cat([x, repeated(skip, x)], dim=1), emb)
            if self.attentions:
                x = self.attentions[i](x, context, bias)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class CrossAttnUpBlock2D(UpBlock2D):
    """An up block with attention, under the name by which tools look for it."""


DOWN = {cls.__name__: cls for cls in (DownBlock2D, CrossAttnDownBlock2D)}
MID = {cls.__name__: cls for cls in (UNetMidBlock2D, UNetMidBlock2DCrossAttn)}
UP = {cls.__name__: cls for cls in (UpBlock2D, CrossAttnUpBlock2D)}
