"""`UNet2DConditionModel`: diffusers' class with this project's network inside, and all that is written for it.

The stock class builds itself, in its own order and with its own random numbers, so that whatever takes hold of a
diffusers U-Net finds what it looks for: names, classes, attributes, processors. Then three kinds of its layers are
given a class that is stock's and the core's at once (`ResnetBlock2D`, `Transformer2DModel`, `Attention`), called as
diffusers calls them and computing as the core does; and `forward` runs the core's stack of skips over stock's blocks. A
layer that was changed in a way the core does not know, by another attention processor for one, runs stock's own body.

Shapes: B batch, C channels, H and W image, L context length, D context width, E embedding width.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers.models.attention_processor as stock_attention
import diffusers.models.resnet as stock_resnet
import diffusers.models.transformers.transformer_2d as stock_transformer
import diffusers.models.unets.unet_2d_condition as stock
import torch
from diffusers import UNet2DConditionModel as StockUNet
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn import functional as F

from . import attention, layers
from .config import UNetConfig
from .errors import InputError
from .unet import run_stack

_log = logging.getLogger(__name__)

DefaultProcessor = stock_attention.AttnProcessor2_0

# Trajectories of more steps than this are computed anew beyond it; a step of SD 1.5 keeps 0.2 MB.
MAX_STEPS_KEPT = 1000
MAX_CONTEXTS_KEPT = 4


# --- layers that are stock's and the core's at once ---------------------------------------------------------------


class ResnetBlock2D(stock_resnet.ResnetBlock2D, layers.ResnetBlock2D):
    """The residual block: called as diffusers calls it, with the embedding before its SiLU, or with projections."""

    time_embedding_norm: str

    def adopt(self) -> None:
        """Give the core the attributes that it knows this layer by."""
        self.scale_shift = self.time_embedding_norm == "scale_shift"

    def forward(  # type: ignore[override]
        self, input_tensor: Tensor, temb: layers.Embedding, *args: Any, **kwargs: Any
    ) -> Tensor:
        """x [B, C, H, W], temb [B, E] or, along a trajectory, every block's projection of it."""
        if args or kwargs:
            return stock_resnet.ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        emb = temb if isinstance(temb, tuple) else F.silu(temb)
        return layers.ResnetBlock2D.forward(self, input_tensor, emb)


class Transformer2DModel(stock_transformer.Transformer2DModel, attention.Transformer2DModel):
    """The frame around the transformer blocks: the way in and out is the core's, which keeps channels_last."""

    use_linear_projection: bool

    def adopt(self) -> None:
        self.linear = self.use_linear_projection

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        tokens = self.enter(hidden_states)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        return residual + self.leave(hidden_states, height)


class Attention(stock_attention.Attention, attention.Attention):
    """Attention that computes as the core does while its processor is the default one, and else as the processor does.

    The default processor's `_attention_backend`, which `set_attention_backend` sets, chooses the kernel.
    """

    processor: Any
    fused_projections: bool
    is_cross_attention: bool
    cross_attention_dim: int

    def adopt(self) -> None:
        self.set_processor(self.processor)

    def set_processor(self, processor: Any) -> None:
        if type(processor) is DefaultProcessor and not hasattr(processor, "_attention_backend"):
            processor._attention_backend = None  # stock sets a backend only where there is a place for it
        super().set_processor(processor)

    @property
    def plain(self) -> bool:
        """Whether nothing was changed about how this layer attends."""
        changed = self.fused_projections or "forward" in self.__dict__
        return type(self.processor) is DefaultProcessor and not changed

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: attention.Context | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """x [B, N, C], context [B, L, D] or keys and values, mask an additive bias [B, 1, L]; returns [B, N, C]."""
        plain = self.plain and hidden_states.ndim == 3 and not cross_attention_kwargs
        if plain and _fits(attention_mask, hidden_states if encoder_hidden_states is None else encoder_hidden_states):
            bias = None if attention_mask is None else attention_mask[:, None]  # [B, 1, 1, L]
            return attention.Attention.forward(self, hidden_states, encoder_hidden_states, bias)
        return stock_attention.Attention.forward(
            self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        backend = self.processor._attention_backend
        if backend is None:
            return super().attend(q, k, v, bias)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # diffusers' kernels take [B, tokens, h, d]
        return dispatch_attention_fn(q, k, v, attn_mask=bias, backend=backend).transpose(1, 2)


def _fits(bias: Tensor | None, context: attention.Context) -> bool:
    """Whether there is a bias for every token attended to; stock repairs one that is of another length."""
    if bias is None:
        return True
    length = context[0][0].shape[2] if isinstance(context, tuple) else context.shape[1]
    return bias.ndim == 3 and bias.shape[-1] == length


_NATIVE = {cls.__bases__[0]: cls for cls in (ResnetBlock2D, Transformer2DModel, Attention)}


# --- what is constant along a trajectory --------------------------------------------------------------------------


class _Memory:
    """The latest results of a computation, each held together with the very tensors it was computed from."""

    def __init__(self, size: int) -> None:
        self._entries: deque[tuple[Hashable, Sequence[Tensor], list[int], Any]] = deque(maxlen=size)

    def get(self, key: Hashable, tensors: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """What `compute()` gave for this key and these tensors, unchanged since; computed where there is none."""
        versions = [tensor._version for tensor in tensors]
        for known_key, known, known_versions, value in self._entries:
            if known_key == key and known_versions == versions and all(map(operator.is_, known, tensors)):
                return value
        value = compute()
        self._entries.append((key, tensors, versions, value))
        return value


class _Trajectory:
    """What `UNet2DConditionModel.cached` keeps of a network, and the layers whose outputs it keeps."""

    def __init__(self, unet: nn.Module) -> None:
        self.resnets = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
        self.readers = _readers(unet)
        for slot, resnet in enumerate(self.resnets):
            resnet.slot = slot
        for slot, reader in enumerate(self.readers):
            reader.slot = slot
        self.forget()

    def forget(self) -> None:
        self._state: list[Any] = []
        self.projections, self.contexts = _Memory(MAX_STEPS_KEPT), _Memory(MAX_CONTEXTS_KEPT)

    def follow_weights(self, unet: nn.Module) -> None:
        """Forget everything when the weights have changed, or the adapters on them."""
        state = [part for layer in self._layers(unet) for part in _state_of(layer)]
        # The parameters themselves are held, and compared by identity: an address may be another one's tomorrow.
        if len(state) != len(self._state) or not all(map(_same, state, self._state)):
            self.forget()
            self._state = state

    def refuse_unsafe(self, unet: nn.Module) -> None:
        """Raises InputError where something would not be as at the step before, or not be told of this one."""
        reason = None
        if unet.training:
            reason = "the network is in training mode: call eval()"
        elif torch.compiler.is_compiling():
            reason = "the network is being compiled: use the one or the other"
        elif not all(reader.plain for reader in self.readers):
            reason = "an attention processor of its own is set, or projections are fused"
        elif any(_hooked(module) for layer in (*self._layers(unet), *self.readers) for module in layer.modules()):
            reason = "hooks (offloading, layerwise casting ...) sit on layers that would not run at every step"
        if reason:
            raise InputError(f"cached() would not be safe: {reason}")

    def _layers(self, unet: Any) -> list[nn.Module]:
        """The layers that do not run at every step."""
        embeddings = [unet.time_embedding, unet.class_embedding, getattr(unet, "add_embedding", None)]
        given = [layer for layer in (*embeddings, unet.encoder_hid_proj) if layer is not None]
        pairs = [layer for reader in self.readers for layer in (reader.to_k, reader.to_v)]
        return [*given, *pairs, *(resnet.time_emb_proj for resnet in self.resnets)]


def _state_of(layer: nn.Module) -> Iterator[Any]:
    """Parts of which one at least changes when the layer's weights do, or the adapters on it, or their scales."""
    for parameter in layer.parameters():
        yield from (parameter, parameter._version, parameter.device, parameter.dtype)
    for module in layer.modules():
        for name in ("scaling", "_active_adapter", "merged_adapters", "_disable_adapters"):  # peft's
            if hasattr(module, name):
                yield repr(getattr(module, name))


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


def _hooked(module: nn.Module) -> bool:
    """Whether something of somebody else's runs when this module does."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or any(hasattr(module, name) for name in ("_hf_hook", "_diffusers_hook"))


def _readers(unet: nn.Module) -> list[Attention]:
    """The attentions to the context."""
    return [module for module in unet.modules() if isinstance(module, Attention) and module.is_cross_attention]


# --- the model ----------------------------------------------------------------------------------------------------


class _TakenForStock(type):
    """diffusers' `from_pipe` asks whether `type(unet)` is among the classes that it expects: here the answer is yes."""

    def __eq__(cls, other: object) -> bool:
        return other is StockUNet or super().__eq__(other)

    __hash__ = type.__hash__


class UNet2DConditionModel(StockUNet, metaclass=_TakenForStock):
    """The conditional U-Net of Stable Diffusion, for every pipeline, loader and tool that knows diffusers' own.

    Arguments, files and methods are diffusers'. `native` is False for a configuration outside the core (K blocks,
    DeepFloyd IF, Kandinsky 2.x, GLIGEN, dual attention): it then runs stock's own body, and a log line says so.
    """

    native: bool
    _trajectory: _Trajectory | None = None

    @functools.wraps(StockUNet.__init__)  # type: ignore[misc]  # its signature lists a configuration's keys
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A pipeline writes this into model_index.json, where "diffusers" is what everybody can load.
        self.__dict__["__module__"] = StockUNet.__module__
        try:
            UNetConfig.from_diffusers(self.config, ignore_unknown=True)
            self.native = True
        except InputError as error:
            self.native = False
            _log_once(f"runs diffusers' own body: {error}")
            return
        for module in self.modules():
            if type(module) in _NATIVE:
                module.__class__ = _NATIVE[type(module)]
                module.adopt()
        readers = _readers(self)
        self._context_width: int | None = readers[0].cross_attention_dim if readers else None

    # --- running ---------------------------------------------------------------------------------------------------

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict what the network was trained to predict (eps, x0, v ...) for noisy images or latents.

        Args:
            sample: x, [B, in_channels, H, W]; any H and W.
            timestep: one for all, or [B]; may be fractional.
            encoder_hidden_states: context, [B, L, D].
            class_labels: [B] classes or timesteps, or [B, n] vectors, as `class_embed_type` says.
            timestep_cond: [B, time_cond_proj_dim] embedding of the guidance scale (LCM).
            attention_mask: [B, H * W], 1 where the image may attend to itself.
            cross_attention_kwargs: for the attention processors; `scale` is the LoRA's.
            added_cond_kwargs: `text_embeds` [B, P] and `time_ids` [B, n] (SDXL), `image_embeds` (IP-Adapter).
            down_block_additional_residuals, mid_block_additional_residual: a ControlNet's.
            down_intrablock_additional_residuals: a T2I-Adapter's.
            encoder_attention_mask: [B, L], true or 1 where the context is attended to, or an additive [B, 1, L].

        Returns:
            UNet2DConditionOutput with `sample` [B, out_channels, H, W]; without `return_dict` a tuple of it.

        Raises:
            InputError: an input that the configuration asks for is missing or has the wrong width.
        """
        given = {"class_labels": class_labels, "timestep_cond": timestep_cond}
        added = added_cond_kwargs or {}
        if down_intrablock_additional_residuals is None and mid_block_additional_residual is None:
            # How a T2I-Adapter's residuals were passed before they had an argument of their own.
            down_intrablock_additional_residuals, down_block_additional_residuals = (
                down_block_additional_residuals,
                None,
            )
        if not self.native:
            output = super().forward(
                sample,
                timestep,
                encoder_hidden_states,
                attention_mask=attention_mask,
                cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added_cond_kwargs,
                down_block_additional_residuals=_listed(down_block_additional_residuals),
                mid_block_additional_residual=mid_block_additional_residual,
                down_intrablock_additional_residuals=_listed(down_intrablock_additional_residuals),
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
                **given,
            )[0]
        else:
            self._check(sample, encoder_hidden_states, added, **given)
            condition = self._condition if self._trajectory is None else self._condition_once
            temb, context = condition(sample, timestep, encoder_hidden_states, added, **given)
            text = {
                "encoder_hidden_states": context,
                "attention_mask": _bias(attention_mask, sample),
                "encoder_attention_mask": _bias(encoder_attention_mask, sample),
                "cross_attention_kwargs": cross_attention_kwargs,
            }
            output = run_stack(
                self,
                2 * sample - 1 if self.config.center_input_sample else sample,
                functools.partial(_call, temb=temb, text=text),
                down_block_additional_residuals,
                mid_block_additional_residual,
                down_intrablock_additional_residuals,
            )
        return stock.UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def _condition(
        self, sample: Tensor, timestep: Any, context: Tensor | None, added: dict[str, Any], **given: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The embedding of all that the residual blocks are conditioned on [B, E], and what is attended to."""
        emb = self._embed(sample, timestep, context, added, **given)
        return emb, self.process_encoder_hidden_states(encoder_hidden_states=context, added_cond_kwargs=added)

    def _embed(
        self,
        sample: Tensor,
        timestep: Any,
        context: Tensor | None,
        added: dict[str, Any],
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> Tensor:
        emb: Tensor = self.time_embedding(self.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
        classes = self.get_class_embed(sample=sample, class_labels=class_labels)
        if classes is not None:
            emb = torch.cat([emb, classes], dim=-1) if self.config.class_embeddings_concat else emb + classes
        extra = self.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
        return emb if extra is None else emb + extra

    def _check(
        self,
        sample: Tensor,
        context: Tensor | None,
        added: Mapping[str, Any],
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> None:
        """Raises InputError for an input that is missing or has the wrong width, with the shape it should have."""
        config: Any = self.config
        problems: list[str] = []

        def need(name: str, value: Any, *shape: int | str | None) -> None:
            """`shape` has numbers where a size is fixed, and letters where it is not."""
            found = list(value.shape) if isinstance(value, Tensor) else []
            fixed = [size if isinstance(size, int) else own for size, own in zip(shape, found, strict=False)]
            if len(found) != len(shape) or found != fixed:
                wanted = ", ".join(map(str, shape))
                problems.append(f"{name} is {found or 'missing'}, and must be [{wanted}]")

        channels: Any = self.conv_in.weight
        need("sample", sample, "B", channels.shape[1], "H", "W")
        if self._context_width is not None:
            projected = config.encoder_hid_dim_type == "text_proj" or getattr(self, "text_encoder_hid_proj", None)
            width = config.encoder_hid_dim if projected else self._context_width
            need("encoder_hidden_states", context, "B", "L", width)
        if timestep_cond is not None:
            need("timestep_cond", timestep_cond, "B", config.time_cond_proj_dim or 0)
        if config.class_embed_type in ("projection", "simple_projection"):
            need("class_labels", class_labels, "B", config.projection_class_embeddings_input_dim)
        elif config.class_embed_type == "identity":
            need("class_labels", class_labels, "B", config.time_embedding_dim or 4 * config.block_out_channels[0])
        elif self.class_embedding is not None and class_labels is None:
            problems.append("class_labels is missing, and must be [B]")
        if config.addition_embed_type == "text_time":
            pooled, ids = added.get("text_embeds"), added.get("time_ids")
            total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
            if pooled is None or ids is None or pooled.shape[-1] + each * (ids.numel() // len(pooled)) != total:
                shapes = ["missing" if value is None else list(value.shape) for value in (pooled, ids)]
                problems.append(
                    f'added_cond_kwargs["text_embeds"] is {shapes[0]} and ["time_ids"] is {shapes[1]}, and they must be'
                    f" [B, P] and [B, n] with P + {each} * n = {total}"
                )
        if config.encoder_hid_dim_type == "ip_image_proj" and added.get("image_embeds") is None:
            problems.append('added_cond_kwargs["image_embeds"] is missing, which the loaded IP-Adapter needs')
        if problems:
            raise InputError("; ".join(problems))

    # --- along a trajectory ----------------------------------------------------------------------------------------

    @contextmanager
    def cached(self) -> Iterator[UNet2DConditionModel]:
        """`with unet.cached(): pipe(...)` computes once what does not depend on the image.

        Keys and values of a context are computed when its tensor is first seen, every residual block's projection of
        the embedding when a timestep is. Both are found again by the very tensors that they were computed from, and
        are dropped when a tensor, a weight or an adapter has changed since, except through `.data`, which torch does
        not count; all is forgotten at the end of the block.

        Raises:
            InputError: here or in a call, where it would be unsafe: with gradients, in training mode, while compiling,
                with attention processors, hooks or offloading that would not see every step, or outside the core.
        """
        if not self.native:
            raise InputError("cached() would not be safe: this configuration runs diffusers' own body")
        before, self._trajectory = self._trajectory, _Trajectory(self)
        try:
            self._trajectory.refuse_unsafe(self)
            yield self
        finally:
            self._trajectory = before

    def _condition_once(
        self, sample: Tensor, timestep: Any, context: Tensor | None, added: dict[str, Any], **given: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[attention.KeysValues, ...] | None]:
        """As `_condition`, but the residual blocks' projections and the attentions' keys and values, computed once."""
        trajectory = self._trajectory
        assert trajectory is not None
        trajectory.refuse_unsafe(self)
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise InputError("cached() would not be safe: draw under torch.no_grad(), where changes can be seen")
        trajectory.follow_weights(self)

        def project() -> tuple[Tensor, ...]:
            emb = F.silu(self._embed(sample, timestep, context, added, **given))
            return tuple(resnet.time_emb_proj(emb) for resnet in trajectory.resnets)

        def read() -> tuple[attention.KeysValues, ...] | None:
            text = self.process_encoder_hidden_states(encoder_hidden_states=context, added_cond_kwargs=added)
            return None if text is None else tuple(reader.keys_values(text) for reader in trajectory.readers)

        times = timestep.tolist() if isinstance(timestep, Tensor) else timestep
        step = (len(sample), sample.dtype, tuple(times) if isinstance(times, list) else times)
        conditions = [value for value in (*given.values(), *added.values()) if isinstance(value, Tensor)]
        tokens = [] if context is None else [context]
        return trajectory.projections.get(step, conditions, project), trajectory.contexts.get((), tokens, read)

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As of PeftAdapterMixin; what `cached` keeps is forgotten, as peft swaps weights through `.data`."""
        super().load_lora_adapter(*args, **kwargs)
        if self._trajectory is not None:
            self._trajectory.forget()

    # --- switches --------------------------------------------------------------------------------------------------

    def fuse_qkv_projections(self) -> None:
        """One projection for queries, keys and values; a second call changes nothing."""
        if not self._fused():
            super().fuse_qkv_projections()

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`, with nothing of it left in the state dict; without it, nothing is changed."""
        fused = self._fused()
        if fused:
            super().unfuse_qkv_projections()
        for module in fused:
            module.fused_projections = False
            for name in ("to_qkv", "to_kv"):
                module._modules.pop(name, None)

    def _fused(self) -> list[stock_attention.Attention]:
        return [m for m in self.modules() if isinstance(m, stock_attention.Attention) and m.fused_projections]


def _call(
    block: nn.Module, x: Tensor, *, temb: Any, text: Mapping[str, Any], residual: Tensor | None = None, **step: Any
) -> Any:
    """Run one of stock's blocks the way diffusers calls it; `step` as `run_stack` says."""
    attends = getattr(block, "has_cross_attention", False)
    inputs = dict(text) if attends else {}
    if "skips" in step:
        return block(
            hidden_states=x,
            temb=temb,
            res_hidden_states_tuple=tuple(step["skips"]),
            upsample_size=step["size"],
            **inputs,
        )
    if residual is None:
        return block(hidden_states=x, temb=temb, **inputs)
    if attends:
        return block(hidden_states=x, temb=temb, additional_residuals=residual, **inputs)
    x, outputs = block(hidden_states=x, temb=temb)
    x = x + residual
    return x, (*outputs[:-1], x)


def _bias(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask [B, L], true or 1 to keep, as a bias [B, 1, L] in x's dtype; a bias as it is."""
    if mask is None or mask.ndim != 2:
        return mask
    # Not -inf: a context that is masked altogether then counts evenly, where a softmax of -inf is NaN.
    return (1 - mask.to(x.dtype))[:, None] * -10000.0


def _listed(residuals: Sequence[Tensor] | None) -> list[Tensor] | None:
    """A list of its own: stock's forward takes the residuals off the one that it is given."""
    return None if residuals is None else list(residuals)


@functools.cache
def _log_once(text: str) -> None:
    _log.warning("UNet2DConditionModel %s", text)
