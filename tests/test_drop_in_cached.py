"""`unet.cached()`: what is constant along a trajectory is computed once, and nothing stale is ever used."""

import threading
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from drop_in_pair import INPUTS, TINY, Unet, assert_same, draw, middle, pair, random_pair, relative, same
from families import NARROW, cast, inputs, stock_call
from torch import nn

import diffusion_unet.unet_2d_condition as drop_in
from diffusion_unet import InputError
from diffusion_unet import UNet2DConditionModel as Ours

CPU = torch.device("cpu")


def count_calls(modules: list[nn.Module]) -> list[int]:
    """How often any of the modules runs, without a hook: those would be a reason to refuse."""
    calls = [0]
    for module in modules:

        def counted(*args: Any, forward: Any = module.forward) -> Any:
            calls[0] += 1
            return forward(*args)

        module.forward = counted  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("name", ["sd15", "sdxl", "upscaler", "lcm", "unclip", "kolors", "concatenated-classes"])
def test_cached_equals_the_plain_call_and_computes_once(name: str) -> None:
    _, ours = random_pair(NARROW[name])
    given = inputs(NARROW[name], mask=False)
    steps = [torch.tensor(t) for t in (801, 401.5, 1)]
    with torch.no_grad():
        plain = [stock_call(ours, given | {"timestep": t}) for t in steps]
        readers = drop_in._readers(ours)
        text = count_calls([layer for reader in readers for layer in (reader.to_k, reader.to_v)])
        resnets = [m for m in ours.modules() if isinstance(m, drop_in.ResnetBlock2D)]
        time = count_calls([resnet.time_emb_proj for resnet in resnets])
        with ours.cached() as unet:
            for _ in range(2):
                for t, expected in zip(steps, plain, strict=True):
                    assert relative(stock_call(unet, given | {"timestep": t}), expected) < 1e-5
    assert text == [2 * len(readers)]
    assert time == [len(steps) * len(resnets)]


def test_cached_never_shows_one_prompt_the_others() -> None:
    ours, values, other = random_pair(TINY)[1], inputs(TINY, mask=False), torch.randn(2, 7, 24)
    with torch.no_grad():
        expected = [stock_call(ours, values | {"context": context}) for context in (values["context"], other)]
        with ours.cached():
            for _ in range(2):
                for context, output in zip((values["context"], other), expected, strict=True):
                    assert relative(stock_call(ours, values | {"context": context}), output) < 1e-5
            values["context"].copy_(other)  # the same tensor, with another prompt in it
            assert relative(stock_call(ours, values), expected[1]) < 1e-5
            for _ in range(10):  # new tensors, that may come to lie where old ones lay
                context = torch.randn(2, 7, 24)
                inside = stock_call(ours, values | {"context": context})
                trajectory, ours._trajectory = ours._trajectory, None
                assert relative(inside, stock_call(ours, values | {"context": context})) < 1e-5
                ours._trajectory = trajectory
                del context
    assert ours._trajectory is None


def test_cached_notices_other_conditions() -> None:
    _, ours = random_pair(NARROW["sdxl"])
    given = inputs(NARROW["sdxl"], mask=False)
    with torch.no_grad(), ours.cached():
        first = stock_call(ours, given)
        given["pooled"].mul_(2)
        second = stock_call(ours, given)
        third = stock_call(ours, {key: value[:1] for key, value in given.items()})
    with torch.no_grad():
        assert relative(second, stock_call(ours, given)) < 1e-5 < 1e-3 < relative(second, first)
        assert relative(third, second[:1]) < 1e-5


def test_cached_follows_another_dtype() -> None:
    ours, values = random_pair(TINY)[1], inputs(TINY, mask=False)
    with torch.no_grad(), ours.cached():
        stock_call(ours, values)
        ours.double()
        inside = stock_call(ours, cast(values, torch.float64))
        assert inside.dtype == torch.float64
    with torch.no_grad():
        assert relative(inside, stock_call(ours, cast(values, torch.float64))) < 1e-5


def test_threads_in_one_cached_block_get_their_own_prompts() -> None:
    ours, values = random_pair(TINY)[1], inputs(TINY, mask=False)
    contexts = [torch.randn(2, 7, 24) for _ in range(4)]
    with torch.no_grad():
        expected = [stock_call(ours, values | {"context": context}) for context in contexts]
    found: dict[int, list[float]] = {}

    def draw(i: int) -> None:
        with torch.no_grad():
            outputs = [stock_call(ours, values | {"context": contexts[i]}) for _ in range(5)]
        found[i] = [relative(output, expected[i]) for output in outputs]

    with ours.cached():
        threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == [0, 1, 2, 3] and max(max(errors) for errors in found.values()) < 1e-5


# --- what is refused, and what is noticed


UNSAFE: dict[str, Callable[[Ours], Any]] = {
    "training mode": lambda unet: unet.train(),
    "processor": lambda unet: middle(unet).attn2.set_processor(AttnProcessor()),
    "fused": lambda unet: unet.fuse_qkv_projections(),
    "hooks": lambda unet: middle(unet).attn2.to_k.register_forward_hook(lambda *_: None),
    "group offloading": lambda unet: unet.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
    "offloading": lambda unet: accelerate.cpu_offload(unet, execution_device=CPU),
    "casting": lambda unet: unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32),
    "of its own": lambda unet: setattr(middle(unet).attn2, "forward", middle(unet).attn2.forward),
}


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
@pytest.mark.parametrize("reason", UNSAFE)
def test_cached_refuses_what_would_not_see_every_step(reason: str, inside: bool) -> None:
    unet = pair()[1]
    if not inside:
        UNSAFE[reason](unet)
        with pytest.raises(InputError, match="would not be safe: "), unet.cached():
            pass
    else:
        with unet.cached():
            draw(unet)
            UNSAFE[reason](unet)
            with pytest.raises(InputError, match="would not be safe: "):
                draw(unet)
    assert unet._trajectory is None


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_cached_refuses_gradients_and_inference_mode(mode: Callable[[], Any]) -> None:
    unet = pair()[1]
    with unet.cached():
        with mode(), pytest.raises(InputError, match=r"torch\.no_grad"):
            stock_call(unet, INPUTS)
        assert_same(draw(unet), draw(pair()[0]))


@torch.no_grad()
def _replace(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight * 1.5)


@torch.no_grad()
def _step(unet: Unet) -> None:
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(unet.parameters(), lr=0.01).step()


CHANGES: dict[str, Callable[[Unet], Any]] = {
    "keys": lambda unet: middle(unet).attn2.to_k.weight.mul_(1.5),
    "values": lambda unet: middle(unet).attn2.to_v.weight.mul_(1.5),
    "time": lambda unet: unet.time_embedding.linear_1.bias.add_(0.5),
    "projection": lambda unet: unet.up_blocks[1].resnets[0].time_emb_proj.weight.mul_(1.5),
    "replaced": lambda unet: _replace(middle(unet).attn2.to_k),
    "loaded": lambda unet: unet.load_state_dict({key: 1.1 * value for key, value in unet.state_dict().items()}),
    "trained": _step,
}


@pytest.mark.parametrize("change", CHANGES)
def test_cached_draws_follow_a_change_of_the_weights(change: str) -> None:
    stock, ours = pair()
    with ours.cached():
        before = draw(ours)
        for unet in (stock, ours):
            with torch.no_grad():
                CHANGES[change](unet)
        assert_same(draw(ours), draw(stock))
        assert not same(draw(ours), before)
