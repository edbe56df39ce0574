"""Switches and attention processors of a diffusers U-Net, on the drop-in and on diffusers' own class."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers import UNet2DConditionModel as Stock
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor
from drop_in_pair import ATTENTIONS, INPUTS, TINY, Unet, assert_same, draw, pair, pipeline, same
from families import stock_call
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from diffusion_unet.errors import InputError

# --- switches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switch:
    on: Callable[[Unet], Any]
    works: Callable[[Unet], bool]  # whether something is seen of it in the network
    off: Callable[[Unet], Any] | None = None
    changes_output: bool = False


def _processors_are(cls: type) -> Callable[[Unet], bool]:
    return lambda unet: all(type(processor) is cls for processor in unet.attn_processors.values())


def _sliced(size: str | int) -> Switch:
    works = _processors_are(SlicedAttnProcessor)
    return Switch(lambda unet: unet.set_attention_slice(size), works, lambda unet: unet.set_attention_slice(None))


def _weights_are(kind: torch.dtype | str) -> Callable[[Unet], bool]:
    """Of a linear layer: of this dtype, or of a class of this name."""
    weight = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    return lambda unet: (
        kind in (unet.get_submodule(weight).weight.dtype, type(unet.get_submodule(weight).weight).__name__)
    )


def _offloaded(**how: Any) -> Switch:
    def on(unet: Unet) -> None:
        unet.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **how)

    return Switch(
        on,
        lambda unet: any(
            "group_offloading" in m._diffusers_hook.hooks for m in unet.modules() if hasattr(m, "_diffusers_hook")
        ),
    )


class Int8Linear(nn.Module):
    """Stands in for the layers by which quantisers replace linear ones: whole numbers, with a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def _quantise(unet: Unet) -> None:
    for name, layer in [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)]:
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, Int8Linear(layer))


SWITCHES = {
    "free-u": Switch(
        lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6),
        lambda unet: getattr(unet.up_blocks[0], "b1", None) == 1.5,
        lambda unet: unet.disable_freeu(),
        changes_output=True,
    ),
    "slices-auto": _sliced("auto"),
    "slices-max": _sliced("max"),
    "slices-2": _sliced(2),
    "fused-qkv": Switch(
        lambda unet: unet.fuse_qkv_projections(),
        lambda unet: sum(".to_qkv." in key or ".to_kv." in key for key in unet.state_dict()) == ATTENTIONS,
        lambda unet: unet.unfuse_qkv_projections(),
    ),
    "layerwise-casting": Switch(
        lambda unet: unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32),
        _weights_are(torch.float8_e4m3fn),
        changes_output=True,
    ),
    "group-offload-blocks": _offloaded(offload_type="block_level", num_blocks_per_group=1),
    "group-offload-leaves": _offloaded(offload_type="leaf_level"),
    "cpu-offload": Switch(
        lambda unet: accelerate.cpu_offload(unet, execution_device=torch.device("cpu")),
        lambda unet: unet.conv_in.weight.is_meta,
        remove_hook_from_submodules,
    ),
    "int8-linear-layers": Switch(_quantise, _weights_are(torch.int8), changes_output=True),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_draws_as_with_stock_and_leaves_nothing_behind(name: str) -> None:
    switch = SWITCHES[name]
    stock, ours = pair()
    plain, keys = draw(ours), list(ours.state_dict())
    for unet in (stock, ours):
        assert not switch.works(unet)
        switch.on(unet)
        assert switch.works(unet)
    assert_same(draw(ours), draw(stock))
    assert same(draw(ours), plain) != switch.changes_output
    if switch.off:
        switch.off(ours)
        assert not switch.works(ours)
        assert_same(draw(ours), plain)
        assert list(ours.state_dict()) == keys
        assert _processors_are(AttnProcessor2_0)(ours)


def test_fusing_twice_and_unfusing_what_is_not_fused_change_nothing() -> None:
    ours = pair()[1]
    plain, keys = draw(ours), list(ours.state_dict())
    ours.unfuse_qkv_projections()
    assert_same(draw(ours), plain)
    for _ in range(2):
        ours.fuse_qkv_projections()
    assert_same(draw(ours), plain)
    with torch.no_grad():  # the fused weights are the ones that count
        ours.mid_block.attentions[0].transformer_blocks[0].attn2.to_kv.weight.mul_(2)
    assert not same(draw(ours), plain)
    for _ in range(2):
        ours.unfuse_qkv_projections()
    assert list(ours.state_dict()) == keys
    assert_same(draw(ours), plain)
    with ours.cached():
        assert_same(draw(ours), plain)


def test_an_attention_backend_is_the_kernel_that_runs_until_it_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, calls = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH], []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs.get("attn_mask"))
        return kernel(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, spy)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    ours, mask = pair()[1], INPUTS["context_mask"]
    plain = draw(ours, encoder_attention_mask=mask)
    ours.set_attention_backend("_native_math")
    assert_same(draw(ours, encoder_attention_mask=mask), plain)
    assert len(calls) == ATTENTIONS
    assert sum(bias is not None for bias in calls) == ATTENTIONS / 2
    ours.reset_attention_backend()
    assert_same(draw(ours, encoder_attention_mask=mask), plain)
    assert len(calls) == ATTENTIONS
    with pytest.raises(ValueError, match="must be one of"):
        ours.set_attention_backend("no such kernel")


def test_the_xformers_switch_fails_as_with_stock_and_its_processors_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = pair()
    plain = draw(ours)
    with pytest.raises(ModuleNotFoundError) as theirs:
        stock.enable_xformers_memory_efficient_attention()
    with pytest.raises(ModuleNotFoundError) as mine:
        ours.enable_xformers_memory_efficient_attention()
    assert str(mine.value) == str(theirs.value)
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None, scale: float = 1, **_: Any) -> Tensor:
        """What xformers computes, on [B * h, tokens, d]."""
        calls.append(q.shape)
        return (scale * q @ k.transpose(1, 2)).softmax(dim=-1) @ v

    ops = SimpleNamespace(memory_efficient_attention=kernel)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    ours.set_attn_processor(XFormersAttnProcessor())
    assert_same(draw(ours), plain)
    assert len(calls) == ATTENTIONS
    ours.disable_xformers_memory_efficient_attention()
    assert _processors_are(AttnProcessor2_0)(ours)
    assert_same(draw(ours), plain)


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients() -> None:
    gradients: dict[tuple[type, bool], dict[str, Tensor]] = {}
    for unet in pair():
        runs: list[int] = []
        for layer in (
            unet.down_blocks[0].resnets[0].conv1,
            unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q,
            unet.up_blocks[1].resnets[1].conv1,
        ):
            layer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        for on, times in ((False, 1), (True, 2), (False, 1)):
            (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()
            unet.train().zero_grad()
            runs.clear()
            stock_call(unet, INPUTS).square().mean().backward()
            assert len(runs) == 3 * times
            gradients[type(unet), on] = {name: p.grad.clone() for name, p in unet.named_parameters()}
    reference = gradients.pop((Stock, False))
    for others in gradients.values():
        assert list(others) == list(reference)
        for name, gradient in reference.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_repeated_blocks_are_compiled_once_for_each_shape() -> None:
    torch._dynamo.reset()
    stock, ours = pair(block_out_channels=[16, 16])
    counter = CompileCounter()
    ours.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert_same(draw(ours), draw(stock))
    compiled = counter.frame_count
    assert compiled >= 1
    assert_same(draw(ours, INPUTS["x"] + 1), draw(stock, INPUTS["x"] + 1))
    assert counter.frame_count == compiled
    torch._dynamo.reset()


# --- attention processors -----------------------------------------------------------------------------------------


def test_attention_processors_are_registered_down_up_middle() -> None:
    stock, ours = pair()
    names = list(ours.attn_processors)
    assert names == list(stock.attn_processors)
    assert list(dict.fromkeys(name.split(".")[0] for name in names)) == ["down_blocks", "up_blocks", "mid_block"]


class MapKeeper:
    """A processor as others write them: plain attention that keeps its maps, and whose strength can be called for."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        q, k, v = (
            attn.head_to_batch_dim(t) for t in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        self.maps.append(attn.get_attention_scores(q, k, mask))
        return strength * attn.to_out[0](attn.batch_to_head_dim(self.maps[-1] @ v))


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_processor_of_ones_own_sees_every_call_and_its_arguments(everywhere: bool) -> None:
    stock, ours = pair()
    plain = draw(ours, encoder_attention_mask=INPUTS["context_mask"])
    maps = []
    for unet in (stock, ours):
        keeper = MapKeeper()
        own = [name for name in unet.attn_processors if everywhere or "attn2" in name]
        unet.set_attn_processor(unet.attn_processors | dict.fromkeys(own, keeper))
        assert_same(draw(unet, encoder_attention_mask=INPUTS["context_mask"]), plain)
        assert len(keeper.maps) == len(own)
        maps.append(keeper.maps)
    for theirs, mine in zip(*maps, strict=True):
        assert_same(mine, theirs)
    if everywhere:
        call = {"cross_attention_kwargs": {"strength": 0.5}}
        assert_same(draw(ours, **call), draw(stock, **call))
        assert not same(draw(ours, **call), draw(ours))


def ip_adapter(unet: Unet, seed: int) -> dict[str, dict[str, Tensor]]:
    """A file's content in the original layout: keys and values are numbered by the place of their processor."""
    g = torch.Generator().manual_seed(seed)
    tokens, width, embed = 4, TINY["cross_attention_dim"], 10
    weights = {}
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            size = 32 if name.startswith("mid_block") else 16
            for letter in "kv":
                weights[f"{number}.to_{letter}_ip.weight"] = torch.randn(size, width, generator=g) / 4
    image = {"proj.weight": torch.randn(tokens * width, embed, generator=g), "proj.bias": torch.zeros(tokens * width)}
    return {
        "image_proj": image | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
        "ip_adapter": weights,
    }


@pytest.mark.parametrize("count", [1, 2])
def test_ip_adapters_are_loaded_scaled_masked_and_unloaded(count: int) -> None:
    stock, ours = map(pipeline, pair())
    plain = draw(ours.unet)
    g = torch.Generator().manual_seed(5)
    images = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 10, generator=g) for _ in range(count)]}}
    masks = {
        "cross_attention_kwargs": {
            "ip_adapter_masks": [torch.rand(1, 1, 8, 8, generator=g).round() for _ in range(count)]
        }
    }
    for pipe in (stock, ours):
        files = [ip_adapter(stock.unet, seed) for seed in range(count)]
        pipe.load_ip_adapter(files, subfolder=[""] * count, weight_name=[""] * count, image_encoder_folder=None)
    seen = [plain]

    def compare(**arguments: Any) -> None:
        seen.append(draw(ours.unet, **arguments))
        assert_same(seen[-1], draw(stock.unet, **arguments))
        assert not any(same(seen[-1], before) for before in seen[:-1])

    compare(**images)
    compare(**images, **masks)
    for scale in (0.4, {"up": {"block_1": [0.0, 0.7]}}):
        for pipe in (stock, ours):
            pipe.set_ip_adapter_scale([scale] * count)
        compare(**images)
    with pytest.raises(InputError, match="image_embeds"):
        draw(ours.unet)
    with pytest.raises(InputError, match="processor"), ours.unet.cached():
        pass
    ours.unload_ip_adapter()
    assert_same(draw(ours.unet), plain)
    assert list(ours.unet.state_dict()) == list(pair()[1].state_dict())
