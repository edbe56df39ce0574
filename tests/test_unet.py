"""The network beside diffusers' own class on the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from families import FAMILIES, NARROW, cast, inputs, stock_call
from torch._dynamo.testing import CompileCounter

from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.unet import UNet


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[UNet2DConditionModel, UNet]:
    """The stock class and ours with the same weights, random everywhere (norms and biases too)."""
    torch.manual_seed(0)
    stock = UNet2DConditionModel.from_config(NARROW[name])
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    unet = UNet(UNetConfig.from_diffusers(NARROW[name]))
    unet.load_state_dict(stock.state_dict())
    return stock.to(dtype), unet.to(dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (2, 5)], ids=["even", "odd", "strip"])
@pytest.mark.parametrize("name", NARROW)
def test_outputs_and_all_gradients_equal_the_stock_class(name: str, size: tuple[int, int]) -> None:
    stock, unet = pair(name)
    values = cast(inputs(NARROW[name], height=size[0], width=size[1]), torch.float64)
    differentiable = [key for key in ("x", "context", "pooled", "guidance") if key in values]
    gradients = []
    outputs = []
    for call, model in ((stock_call, stock), (lambda m, v: m(**v), unet)):
        for key in differentiable:
            values[key] = values[key].detach().clone().requires_grad_()
        output = call(model, values)
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        (output * weight).sum().backward()
        outputs.append(output.detach())
        gradients.append([values[key].grad for key in differentiable] + [p.grad for p in model.parameters()])
    assert outputs[0].shape[-2:] == size
    assert relative(outputs[1], outputs[0]) < 1e-10
    assert [n for n, _ in stock.named_parameters()] == [n for n, _ in unet.named_parameters()]
    largest = max(float(g.abs().max()) for g in gradients[0])
    for theirs, ours in zip(*gradients, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-10 * max(float(theirs.abs().max()), 1e-3 * largest)


@pytest.mark.parametrize("name", NARROW)
def test_float32_error_is_at_most_twice_the_stock_class_own(name: str) -> None:
    stock, unet = pair(name, torch.float32)
    errors_stock, errors_unet = [], []
    for seed in range(2):
        values = inputs(NARROW[name], seed=seed)
        with torch.no_grad():
            truth = stock_call(stock.double(), cast(values, torch.float64))
            errors_stock.append(float((stock_call(stock.float(), values) - truth).square().mean().sqrt()))
            errors_unet.append(float((unet(**values) - truth).square().mean().sqrt()))
    assert 0 < sum(errors_unet) <= 2 * sum(errors_stock)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_width_keys_and_shapes_are_those_of_the_released_checkpoints(name: str) -> None:
    with torch.device("meta"):
        stock = UNet2DConditionModel.from_config(FAMILIES[name])
        unet = UNet(UNetConfig.from_diffusers(FAMILIES[name]))
    assert {k: v.shape for k, v in unet.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "upscaler", "lcm", "kolors", "timestep-classes"])
def test_initial_weights_equal_the_stock_class_from_the_same_seed(name: str) -> None:
    torch.manual_seed(3)
    stock = UNet2DConditionModel.from_config(NARROW[name]).state_dict()
    torch.manual_seed(3)
    unet = UNet(UNetConfig.from_diffusers(NARROW[name])).state_dict()
    assert all(torch.equal(unet[key], stock[key]) for key in stock)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_controlnet_and_adapter_residuals(name: str) -> None:
    stock, unet = pair(name)
    values: dict[str, Any] = cast(inputs(NARROW[name]), torch.float64)
    skips: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, output: skips.extend(output[1])) for block in unet.down_blocks
    ]
    handles.append(unet.conv_in.register_forward_hook(lambda _m, _a, output: skips.append(output)))
    with torch.no_grad():
        unet(**values)
        for handle in handles:
            handle.remove()
        middle = torch.randn_like(skips[-1])
        control = {"down_residuals": [torch.randn_like(s) for s in skips], "mid_residual": middle}
        per_block, at = [], 0
        for block, level in zip(unet.down_blocks, unet.config.down_levels, strict=True):
            count = len(level.depths) + level.resample
            outputs = skips[1:][at : at + count]
            per_block.append(torch.randn_like(outputs[-2] if level.resample and len(block.attentions) else outputs[-1]))
            at += count
        for extra in (control, {"adapter_residuals": per_block}, {"adapter_residuals": [*per_block, middle]}):
            before = [t.clone() for t in extra.get("adapter_residuals", [])]
            ours, theirs = unet(**values, **extra), stock_call(stock, values | extra)
            assert relative(ours, theirs) < 1e-10
            assert relative(ours, unet(**values)) > 1e-3
            assert len(extra.get("adapter_residuals", [])) == len(before)  # the caller's list is as it was
        with pytest.raises(InputError, match="down_residuals has 1 tensors, and the U-Net"):
            unet(**values, down_residuals=[middle])
        with pytest.raises(InputError, match=r"adapter_residuals has \d tensors, and the U-Net takes \d at most"):
            unet(**values, adapter_residuals=[*per_block, middle, middle])


@pytest.mark.parametrize("name", NARROW)
def test_cache_equals_the_plain_path(name: str) -> None:
    _, unet = pair(name, torch.float32)
    values = inputs(NARROW[name])
    context = values.pop("context", None)
    x, mask = values.pop("x"), values.pop("context_mask", None)
    values.pop("timestep")
    times = [999.0, 501.25, 0.0]
    cache = unet.precompute(context, times, **values)
    with torch.no_grad():
        for t in times:
            plain = unet(x, t, context, context_mask=mask, **values)
            cached = unet(x, t, context, context_mask=mask, cache=cache)
            assert float((cached - plain).std()) <= 1e-5 * float(plain.std())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["sd15", "sd21", "asymmetric", "scale-shift", "no-mid-block", "old-conventions"])
def test_an_image_with_several_texts_is_the_image_repeated(name: str, batch: int) -> None:
    _, unet = pair(name)
    given = [cast(inputs(NARROW[name], batch=batch, seed=seed), torch.float64) for seed in range(3)]
    context, mask = (torch.cat([values[key] for values in given if key in values] or [torch.ones(3 * batch, 7)])
                     for key in ("context", "context_mask"))  # fmt: skip
    x, cache = given[0]["x"], unet.precompute(context, [501.25])
    with torch.no_grad():
        once = unet(x, 501.25, context, context_mask=mask, cache=cache)
        repeated = unet(torch.cat([x] * 3), 501.25, context, context_mask=mask, cache=cache)
    assert once.shape == repeated.shape and relative(once, repeated) < 1e-12
    apart = repeated.unflatten(0, (3, batch))
    assert relative(apart[1], apart[0]) > 1e-3  # or the text would say nothing


def test_what_comes_before_the_text_is_computed_once_for_all_texts() -> None:
    _, unet = pair("sd15", torch.float32)
    rows: dict[str, int] = {}
    for key, module in unet.named_modules():
        module.register_forward_hook(lambda _m, _a, out, key=key: rows.update({key: len(out)}))
    x, context = torch.randn(2, 4, 8, 8), torch.randn(4, 7, 24)
    with torch.no_grad():
        unet(x, 1.0, context, cache=unet.precompute(context, [1.0]))
    first = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert {rows[key] for key in ("conv_in", "down_blocks.0.resnets.0", f"{first}.attn1", f"{first}.attn2.to_q")} == {2}
    assert {rows[key] for key in (f"{first}.attn2", f"{first}.ff", "down_blocks.0.resnets.1", "conv_out")} == {4}


def test_cached_text_and_time_are_not_computed_again() -> None:
    _, unet = pair("sdxl", torch.float32)
    values = inputs(NARROW["sdxl"], mask=False)
    x, context = values["x"], values["context"]
    cache = unet.precompute(context, [10.0], pooled=values["pooled"], time_ids=values["time_ids"])
    called: list[str] = []
    for key, module in unet.named_modules():
        if key.endswith((".attn2.to_k", ".attn2.to_v", "time_emb_proj", "linear_1")):
            module.register_forward_hook(lambda _m, _a, _o, key=key: called.append(key))
    with torch.no_grad():
        unet(x, 10.0, context, cache=cache)
    assert called == []


def test_a_cache_serves_only_its_own_context_and_timesteps() -> None:
    _, unet = pair("sd15", torch.float32)
    values = inputs(NARROW["sd15"], mask=False)
    x, context = values["x"], values["context"]
    cache = unet.precompute(context, [1.0, 2.0])
    with pytest.raises(InputError, match="computed for another context"):
        unet(x, 1.0, context + 1, cache=cache)
    with pytest.raises(InputError, match=r"timestep 3 is not one of the 2"):
        unet(x, 3.0, context, cache=cache)


def test_boolean_mask_and_ones_and_zeros_mean_the_same_and_a_full_mask_is_finite() -> None:
    _, unet = pair("sd15", torch.float32)
    values = inputs(NARROW["sd15"])
    with torch.no_grad():
        boolean = unet(**values)
        integer = unet(**{**values, "context_mask": values["context_mask"].long()})
        empty = unet(**{**values, "context_mask": torch.zeros(2, 7)})
    assert torch.equal(boolean, integer)
    assert bool(empty.isfinite().all())


def test_channels_last_survives_the_whole_forward_and_changes_nothing() -> None:
    _, unet = pair("sd21", torch.float64)
    values = cast(inputs(NARROW["sd21"], height=16, width=16), torch.float64)
    with torch.no_grad():
        plain = unet(**values)
        unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        lost: list[str] = []
        for key, module in unet.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(
                    lambda _m, args, key=key: (
                        None if args[0].is_contiguous(memory_format=torch.channels_last) else lost.append(key)
                    )
                )
        values["x"] = values["x"].to(memory_format=torch.channels_last)
        assert relative(unet(**values), plain) < 1e-12
    assert lost == []


@pytest.mark.parametrize("name", ["sd15", "sdxl", "kolors", "unconditional"])
def test_folders_go_both_ways(name: str, tmp_path: Path) -> None:
    stock, unet = pair(name, torch.float32)
    stock.save_pretrained(tmp_path / "stock")
    unet.save_pretrained(tmp_path / "ours")
    values = inputs(NARROW[name])
    with torch.no_grad():
        truth = stock_call(stock, values)
        loaded = UNet.from_pretrained(tmp_path / "stock")
        reloaded = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
        assert relative(loaded(**values), truth) < 1e-5 > relative(stock_call(reloaded, values), truth)
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in reloaded.state_dict().items())
    assert loaded.config == UNetConfig.from_diffusers(json.loads((tmp_path / "ours" / "config.json").read_text()))


def test_sharded_variant_and_dtype(tmp_path: Path) -> None:
    stock, _ = pair("sd15", torch.float32)
    stock.save_pretrained(tmp_path / "unet", max_shard_size="200KB", variant="fp16")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = UNet.from_pretrained(tmp_path, subfolder="unet", variant="fp16", dtype=torch.float16)
    assert loaded.dtype == torch.float16 and loaded.device.type == "cpu"
    assert torch.equal(loaded.conv_in.weight, stock.conv_in.weight.half())


def test_missing_or_wrong_inputs_are_named_with_the_shape_that_is_needed() -> None:
    unet = pair("sdxl")[1].float()
    values = inputs(NARROW["sdxl"], mask=False)
    for change, message in (
        ({"x": values["x"][:, :3]}, r"x is \[2, 3, 8, 8\], and must be \[B, 4, H, W\]"),
        ({"context": None}, r"context is missing, and must be \[2, L, 24\]"),
        ({"context": values["context"][..., :5]}, r"context is \[2, 7, 5\], and must be \[2, L, 24\]"),
        ({"pooled": None}, r"pooled \[B, P\] and time_ids \[B, n\] are needed"),
    ):
        with pytest.raises(InputError, match=message):
            unet(**{**values, **change})
    unet = pair("upscaler")[1].float()
    values = inputs(NARROW["upscaler"])
    with pytest.raises(InputError, match="class_labels are missing"):
        unet(**{**values, "class_labels": None})


def test_compiles_as_one_graph_and_not_again_for_another_step() -> None:
    _, unet = pair("plain-mid-block", torch.float32)
    values = inputs(NARROW["plain-mid-block"])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    with torch.no_grad():
        for t in (1.0, 500.5):
            values["timestep"] = torch.tensor([t])
            assert torch.equal(compiled(**values), unet(**values))
    assert counter.frame_count == 1
