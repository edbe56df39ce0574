"""The attention half of the U-Net: attention, feed-forward, transformer block, and the frame that holds them.

Shapes: B batch, N = H * W image tokens, L context tokens, C channels, D context width, h heads, d = C / h.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Level, UNetConfig

# What an attention attends to: the context [B, L, D], or each attention's own keys and values of it, computed before.
KeysValues = tuple[Tensor, Tensor]
Context = Tensor | tuple[KeysValues, ...]


def repeated(x: Tensor, like: Tensor) -> Tensor:
    """x [B, ...], once for each of the n texts of B rows each that it is shown with: [n * B, ...], as `like` has.

    Up to the first attention to the text, all that a network makes of an image is the same whatever the text says."""
    return x if len(x) == len(like) else x.repeat(len(like) // len(x), *[1] * (x.ndim - 1))


class Attention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017) of x [B, N, C] to itself or to a context [B, L, D]."""

    slot = 0  # position of this layer's keys and values in a precomputed context

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, context: Tensor) -> KeysValues:
        """[B, L, D] -> keys and values, each [B, h, L, d]."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, context: Context | None = None, bias: Tensor | None = None) -> Tensor:
        """`bias` [B, 1, 1, L] is added to the scores; returns [B, N, C], or with a context of n * B rows as many."""
        q = self._split(self.to_q(x))
        k, v = context[self.slot] if isinstance(context, tuple) else self.keys_values(x if context is None else context)
        return self.to_out[0](rearrange(self.attend(repeated(q, k), k, v, bias), "b h n d -> b n (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(d) + bias) v, each [B, h, tokens, d]: what other kernels may replace."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020): [B, N, C] -> [B, N, out_dim]."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The identity stands where the released weights count a dropout: their output layer is `net.2`.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalised first and added: [B, N, C] -> [B, N, C].

    Without a `context_dim` there is no cross-attention; with `only_cross_attention` the first attends to the text too.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None, only_cross_attention: bool = False) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context_dim if only_cross_attention else None)
        self.norm2 = None if context_dim is None else nn.LayerNorm(dim)
        self.attn2 = None if context_dim is None else Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Context | None = None, bias: Tensor | None = None) -> Tensor:
        h = self.attn1(self.norm1(x), context if self.only_cross_attention else None)
        x = repeated(x, h) + h
        if self.norm2 is not None and self.attn2 is not None:
            h = self.attn2(self.norm2(x), context, bias)
            x = repeated(x, h) + h
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of an image, and the residual around them: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, config: UNetConfig, level: Level, depth: int) -> None:
        super().__init__()
        channels, self.linear = level.channels, config.use_linear_projection
        # The eps is not `norm_eps`: the released weights were trained so.
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, level.heads, level.context_dim, level.only_cross_attention)
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context | None = None, bias: Tensor | None = None) -> Tensor:
        h = self.enter(x)
        for block in self.transformer_blocks:
            h = block(h, context, bias)
        return repeated(x, h) + self.leave(h, height=x.shape[2])

    def enter(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens [B, N, C], normalised and projected; a channels_last image is not copied."""
        x = self.norm(x)
        x = x if self.linear else self.proj_in(x)
        tokens = rearrange(x, "b c h w -> b (h w) c")
        return self.proj_in(tokens) if self.linear else tokens

    def leave(self, tokens: Tensor, height: int) -> Tensor:
        """[B, N, C] -> [B, C, H, W], projected; the image is channels_last, which is how the tokens lie."""
        tokens = self.proj_out(tokens) if self.linear else tokens
        x = rearrange(tokens, "b (h w) c -> b c h w", h=height)
        return x if self.linear else self.proj_out(x)
