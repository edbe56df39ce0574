"""The conditional U-Net of Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752; SDXL: Podell et al. 2023).

State-dict keys and shapes are those of diffusers' `UNet2DConditionModel`, so every released checkpoint of the family
loads unchanged. Shapes: B batch, C channels, H and W image, L context length, D context width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoint, untrusted
from .attention import Attention, BasicTransformerBlock, Context, KeysValues, repeated
from .blocks import DOWN, MID, UP
from .config import UNetConfig
from .errors import InputError
from .layers import Embedding, ResnetBlock2D, TimestepEmbedding, Timesteps

WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True, eq=False)
class Cache:
    """What is constant along a trajectory, computed once by `UNet.precompute` for one context and its timesteps."""

    timesteps: tuple[float, ...]
    context: Tensor | None  # the tensor it was made from; a forward call must bring this very tensor
    projections: tuple[Tensor, ...]  # one [T, B or 1, C or 2C] per residual block
    keys_values: tuple[KeysValues, ...]  # one pair per attention to the text

    def at(self, timestep: float | Tensor) -> tuple[Tensor, ...]:
        """Every residual block's projection of the embedding at one of the timesteps, each [B or 1, C or 2C]."""
        t = float(timestep)
        if t not in self.timesteps:
            raise InputError(f"timestep {t:g} is not one of the {len(self.timesteps)} that the cache was computed for")
        row = self.timesteps.index(t)
        return tuple(table[row] for table in self.projections)


class UNet(nn.Module):
    """Time- and text-conditioned U-Net; see `UNetConfig` for what can be conditioned on."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, emb_dim = config.block_out_channels[0], config.time_embed_dim
        kernel_in, kernel_out = config.conv_in_kernel, config.conv_out_kernel
        self.conv_in = nn.Conv2d(config.in_channels, first, kernel_in, padding=kernel_in // 2)
        self.time_proj = self._timesteps(first)
        self.time_embedding = TimestepEmbedding(first, emb_dim, config.time_cond_proj_dim)
        width = config.encoder_hid_dim
        self.encoder_hid_proj = None if width is None else nn.Linear(width, config.mid_level.context_dim or 0)
        self.class_embedding = _class_embedding(config)
        self.add_time_proj = self._timesteps(config.addition_time_embed_dim or 0)
        width = config.projection_class_embeddings_input_dim or 0
        self.add_embedding = TimestepEmbedding(width, emb_dim) if config.addition_embed_type else None

        # One stack of skips: what the way down leaves on it, the way up takes off it, here as in `forward`.
        skips, channels = [first], first
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for name, level in zip(config.down_block_types, config.down_levels, strict=True):
            self.down_blocks.append(DOWN[name](config, level, channels))
            channels = level.channels
            skips += [channels] * (len(level.depths) + level.resample)
        mid = config.mid_block_type
        self.mid_block = None if mid is None else MID[mid](config, config.mid_level)
        for name, level in zip(config.up_block_types, config.up_levels, strict=True):
            count = len(level.depths)
            self.up_blocks.append(UP[name](config, level, channels, skips[-count:]))
            channels = level.channels
            del skips[-count:]

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, kernel_out, padding=kernel_out // 2)
        readers = self._cross_attentions()
        self.context_width = config.encoder_hid_dim or (readers[0].to_k.in_features if readers else None)
        for slot, resnet in enumerate(self._resnets()):
            resnet.slot = slot
        for slot, attention in enumerate(readers):
            attention.slot = slot

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    # --- running -----------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        timestep: float | Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
        adapter_residuals: Sequence[Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Predict what the network was trained to predict (eps, x0, v ...) for noisy images.

        Args:
            x: [B, in_channels, H, W], scaled as the noise schedule asks; any H and W.
            timestep: one number for all, or [B]; may be fractional.
            context: [B, L, D] text, where the configuration has a `cross_attention_dim`.
            context_mask: [B, L], true or 1 where the context is to be attended to.
            class_labels: [B] class numbers or timesteps, or [B, projection_class_embeddings_input_dim] vectors.
            pooled: [B, P] pooled text (SDXL, Kolors).
            time_ids: [B, 6] original size, crop corner and target size in pixels (SDXL).
            guidance: [B, time_cond_proj_dim] embedding of the guidance scale (LCM).
            down_residuals, mid_residual: a ControlNet's, one for each skip and one for the middle.
            adapter_residuals: a T2I-Adapter's, one for each down block, and maybe one for the middle.
            cache: of `precompute`, for this very `context` and one of its timesteps; it then stands for `context`,
                `class_labels`, `pooled`, `time_ids` and `guidance`. Where it was made without these four, `context` may
                have n * B rows, of n texts for each image: what does not depend on the text is then computed once.

        Returns:
            [B, out_channels, H, W], or [n * B, ...].

        Raises:
            InputError: an input that the configuration asks for is missing or has the wrong shape.
        """
        self._check(x, context)
        emb: Embedding
        text: Context | None
        if cache is None:
            conditions = {"class_labels": class_labels, "pooled": pooled, "time_ids": time_ids, "guidance": guidance}
            emb, text = self._embed(timestep, x.shape[0], **conditions), self._text(context)
        elif context is not cache.context:
            raise InputError("the cache was computed for another context: call precompute() for this one")
        else:
            emb, text = cache.at(timestep), cache.keys_values
        bias = None
        if context_mask is not None:
            # Not -inf: a context that is masked altogether then counts evenly, where a softmax of -inf is NaN.
            bias = (1 - context_mask.to(x.dtype))[:, None, None] * -10000.0  # [B, 1, 1, L]
        if (count := len(adapter_residuals or ())) > (most := len(self.down_blocks) + 1):
            raise InputError(f"adapter_residuals has {count} tensors, and the U-Net takes {most} at most")
        x = 2 * x - 1 if self.config.center_input_sample else x
        given = {"emb": emb, "context": text, "bias": bias}
        residuals = down_residuals, mid_residual, adapter_residuals
        return run_stack(self, x, lambda block, x, **step: block(x, **given, **step), *residuals)

    @torch.no_grad()
    def precompute(self, context: Tensor | None, timesteps: Sequence[float], **conditions: Tensor | None) -> Cache:
        """Compute what does not depend on the image: text keys and values, and all projections of the embedding.

        `context` and `conditions` (class_labels, pooled, time_ids, guidance) are as in `forward`. The result holds for
        these weights and this very context tensor, and carries no gradients: it is for drawing.
        """
        times, given = tuple(float(t) for t in timesteps), {k: v for k, v in conditions.items() if v is not None}
        batch = next((len(value) for value in given.values()), 1)
        rows = torch.tensor(times, device=self.device, dtype=torch.float32).repeat_interleave(batch)
        repeated = {key: torch.cat([value] * len(times)) for key, value in given.items()}
        emb = self._embed(rows, len(rows), **repeated)  # [T * B, E]
        projections = [resnet.time_emb_proj(emb).unflatten(0, (len(times), batch)) for resnet in self._resnets()]
        text = self._text(context)
        keys_values = [] if text is None else [layer.keys_values(text) for layer in self._cross_attentions()]
        return Cache(times, context, tuple(projections), tuple(keys_values))

    def _embed(self, timestep: float | Tensor, batch: int, **conditions: Tensor | None) -> Tensor:
        """SiLU of the embedding of all that the residual blocks are conditioned on, [B, E]."""
        t = torch.as_tensor(timestep, dtype=torch.float32, device=self.device).reshape(-1).expand(batch)
        emb = self.time_embedding(self.time_proj(t).to(self.dtype), conditions.get("guidance"))
        if self.class_embedding is not None:
            labels = conditions.get("class_labels")
            if labels is None:
                raise InputError(f"class_labels are missing: [{batch}] or [{batch}, width], as the U-Net was trained")
            labels = self.time_proj(labels.reshape(-1)) if self.config.class_embed_type == "timestep" else labels
            embedded = self.class_embedding(labels.to(self.dtype) if labels.is_floating_point() else labels)
            emb = torch.cat([emb, embedded], dim=-1) if self.config.class_embeddings_concat else emb + embedded
        if self.add_embedding is not None:
            pooled, time_ids = conditions.get("pooled"), conditions.get("time_ids")
            if pooled is None or time_ids is None:
                step, width = self.config.addition_time_embed_dim, self.config.projection_class_embeddings_input_dim
                raise InputError(f"pooled [B, P] and time_ids [B, n] are needed, with P + {step} * n = {width}")
            ids = self.add_time_proj(time_ids.reshape(-1)).reshape(len(pooled), -1)
            emb = emb + self.add_embedding(torch.cat([pooled.to(self.dtype), ids.to(self.dtype)], dim=-1))
        return F.silu(emb)

    def _text(self, context: Tensor | None) -> Tensor | None:
        return context if context is None or self.encoder_hid_proj is None else self.encoder_hid_proj(context)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise InputError(f"x is {list(x.shape)}, and must be [B, {self.config.in_channels}, H, W]")
        if self.context_width is not None and (context is None or context.shape[-1] != self.context_width):
            given = "missing" if context is None else list(context.shape)
            raise InputError(f"context is {given}, and must be [{len(x)}, L, {self.context_width}]")

    def _timesteps(self, dim: int) -> Timesteps:
        return Timesteps(dim, self.config.flip_sin_to_cos, self.config.freq_shift)

    def _resnets(self) -> list[ResnetBlock2D]:
        return [module for module in self.modules() if isinstance(module, ResnetBlock2D)]

    def _cross_attentions(self) -> list[Attention]:
        blocks = [module for module in self.modules() if isinstance(module, BasicTransformerBlock)]
        pairs = ((block.attn1 if block.only_cross_attention else None, block.attn2) for block in blocks)
        return [attention for pair in pairs for attention in pair if attention is not None]

    # --- files -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> UNet:
        """Load a diffusers folder: `config.json` and `diffusion_pytorch_model[.variant].safetensors`, sharded or not.

        Weights go straight to their places: nothing is initialised first. `dtype` None keeps the file's.

        Raises:
            InputError: a file is missing or damaged, or a key or a shape differs; it names the file and the key.
        """
        path = Path(folder, subfolder or "")
        config = UNetConfig.from_diffusers(untrusted.read_json(path / "config.json"), ignore_unknown=True)
        with torch.device("meta"):
            unet = cls(config)
        tensors, source = checkpoint.read_weights(path, WEIGHTS, variant)
        if dtype is not None:
            tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        checkpoint.load_state(unet, tensors, source)
        return unet.eval()

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write the folder that `from_pretrained`, here and in diffusers, reads."""
        name = f"{WEIGHTS}.{variant}.safetensors" if variant else f"{WEIGHTS}.safetensors"
        checkpoint.write_safetensors(Path(folder, name), self.state_dict(), {"format": "pt"})
        checkpoint.write_json(Path(folder, "config.json"), self.config.to_diffusers())


def run_stack(
    unet: Any,
    x: Tensor,
    call: Callable[..., Any],
    down_residuals: Sequence[Tensor] | None = None,
    mid_residual: Tensor | None = None,
    adapter_residuals: Sequence[Tensor] | None = None,
) -> Tensor:
    """Run the U over the children of `unet`: what the way down leaves on the stack of skips, the way up takes off it.

    A block is run as the caller wants it to be: `call(block, x, residual=...)` going down, for x and the outputs,
    `call(block, x)` in the middle, `call(block, x, skips=..., size=...)` going up. Residuals are as in `UNet.forward`,
    but those of an adapter that fit nowhere are left out; none of the sequences is changed.
    """
    adapters = list(adapter_residuals or ())
    x = unet.conv_in(x)
    skips = [x]
    for block in unet.down_blocks:
        x, outputs = call(block, x, residual=adapters.pop(0) if adapters else None)
        skips += outputs
    if down_residuals is not None:
        if len(down_residuals) != len(skips):
            raise InputError(f"down_residuals has {len(down_residuals)} tensors, and the U-Net {len(skips)} skips")
        skips = [repeated(skip, more) + more for skip, more in zip(skips, down_residuals, strict=True)]
    if unet.mid_block is not None:
        x = call(unet.mid_block, x)
        if adapters and adapters[0].shape == x.shape:
            x = x + adapters.pop(0)
    if mid_residual is not None:
        x = repeated(x, mid_residual) + mid_residual
    for block in unet.up_blocks:
        count = len(block.resnets)
        # The size of the level that comes next, so that images of every size come back as they went in.
        size = skips[-count - 1].shape[-2:] if len(skips) > count else None
        x = call(block, x, skips=skips[-count:], size=size)
        del skips[-count:]
    return unet.conv_out(F.silu(unet.conv_norm_out(x)))


def _class_embedding(config: UNetConfig) -> nn.Module | None:
    width, emb_dim = config.projection_class_embeddings_input_dim or 0, config.time_embed_dim
    match config.class_embed_type:
        case None:
            return None if config.num_class_embeds is None else nn.Embedding(config.num_class_embeds, emb_dim)
        case "timestep":
            return TimestepEmbedding(config.block_out_channels[0], emb_dim)
        case "projection":
            return TimestepEmbedding(width, emb_dim)
        case "simple_projection":
            return nn.Linear(width, emb_dim)
        case _:
            return nn.Identity()
