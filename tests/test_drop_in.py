"""The drop-in beside the class whose place it takes, on the same weights: numbers, promises, trajectories, compilation.

Files, pipelines, LoRA and the other extensions have test files of their own.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers import UNet2DConditionModel as Stock
from drop_in_pair import random_pair, relative
from families import NARROW, SD15, cast, inputs, stock_call
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import diffusion_unet.unet_2d_condition as drop_in
from diffusion_unet import InputError, UNet
from diffusion_unet import UNet2DConditionModel as Ours

OUTSIDE = {
    "K blocks": {
        **NARROW["sd15"],
        "act_fn": "gelu",
        "block_out_channels": [32],
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "down_block_types": ["KCrossAttnDownBlock2D"],
        "layers_per_block": 1,
        "mid_block_type": None,
        "norm_num_groups": None,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_dim": 32,
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "up_block_types": ["KCrossAttnUpBlock2D"],
    },
    "GLIGEN": {**NARROW["plain-mid-block"], "attention_type": "gated"},
    "DeepFloyd IF": {
        **NARROW["no-mid-block"],
        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "encoder_hid_dim": 24,
        "attention_head_dim": 8,
    },
    "Kandinsky 2.2": {
        **NARROW["plain-mid-block"],
        "encoder_hid_dim": 20,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image",
    },
}


@pytest.fixture
def sd15() -> tuple[Stock, Ours]:
    return random_pair(NARROW["sd15"])


@pytest.fixture
def values() -> dict[str, Tensor]:
    return inputs(NARROW["sd15"], mask=False)


# --- numbers


@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=["even", "odd"])
@pytest.mark.parametrize("name", NARROW)
def test_outputs_and_all_gradients_equal_the_stock_class(name: str, size: tuple[int, int]) -> None:
    stock, ours = random_pair(NARROW[name], torch.float64)
    values = cast(inputs(NARROW[name], height=size[0], width=size[1]), torch.float64)
    gradients, outputs = [], []
    for model in (stock, ours):
        values["x"] = values["x"].detach().clone().requires_grad_()
        output = stock_call(model, values)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
        outputs.append(output)
        gradients.append([values["x"].grad, *(p.grad for p in model.parameters())])
    assert ours.native
    assert relative(outputs[1], outputs[0]) < 1e-10
    largest = max(float(g.abs().max()) for g in gradients[0])
    for theirs, own in zip(*gradients, strict=True):
        assert float((own - theirs).abs().max()) < 1e-10 * max(float(theirs.abs().max()), 1e-3 * largest)


@pytest.mark.parametrize("name", NARROW)
def test_the_same_seed_gives_the_same_weights_in_the_same_order(name: str) -> None:
    states = []
    for cls in (Stock, Ours):
        torch.manual_seed(3)
        states.append(cls.from_config(NARROW[name]).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", OUTSIDE)
def test_configurations_outside_the_core_run_the_stock_body(name: str, caplog: pytest.LogCaptureFixture) -> None:
    drop_in._log_once.cache_clear()
    config = {"sample_size": 8, **OUTSIDE[name]}
    with caplog.at_level(logging.WARNING, logger=drop_in.__name__):
        stock, ours = random_pair(config)
        Ours.from_config(config)
    assert not ours.native
    said = [record.getMessage() for record in caplog.records if record.name == drop_in.__name__]
    assert len(said) == 1 and "runs diffusers' own body: U-Net configuration: " in said[0]
    context = torch.randn(2, 7, config.get("encoder_hid_dim") or config["cross_attention_dim"])
    added = {"image_embeds": torch.randn(2, 20)} if "image" in config.get("addition_embed_type", "") else None
    x = torch.randn(2, config.get("in_channels", 4), 8, 8)
    with torch.no_grad():
        theirs, own = (model(x, 5, context, added_cond_kwargs=added).sample for model in (stock, ours))
    assert torch.equal(own, theirs)
    with pytest.raises(InputError, match="cached\\(\\) would not be safe: this configuration"), ours.cached():
        pass


def test_dual_attention_is_left_to_stock_which_cannot_run_it_either() -> None:
    assert not Ours.from_config({**NARROW["sd15"], "dual_cross_attention": True}).native


def test_all_48_arguments_and_every_layer_are_what_tools_look_for() -> None:
    stock, ours = random_pair(NARROW["sdxl"])
    assert isinstance(ours, Stock) and dict(ours.config) == dict(stock.config)
    assert type(ours) == Stock and type(ours) in (nn.Linear, Stock) and type(ours) != nn.Module  # noqa: E721
    for (name, theirs), (own_name, own) in zip(stock.named_modules(), ours.named_modules(), strict=True):
        assert own_name == name and isinstance(own, type(theirs)) and type(own).__name__ == type(theirs).__name__
    assert list(ours.attn_processors) == list(stock.attn_processors)
    assert [type(p) for p in ours.attn_processors.values()] == [type(p) for p in stock.attn_processors.values()]


def test_a_copy_is_a_network_of_its_own(sd15: tuple[Stock, Ours], values: dict[str, Tensor]) -> None:
    ours = sd15[1]
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        before = stock_call(twin, values)
        assert twin.native and torch.equal(before, stock_call(ours, values))
        ours.conv_in.weight.zero_()
        assert torch.equal(stock_call(twin, values), before)


def test_more_input_channels_the_way_training_scripts_add_them(sd15: tuple[Stock, Ours]) -> None:
    outputs = []
    for model in sd15:
        torch.manual_seed(0)
        model.conv_in = nn.Conv2d(8, model.config.block_out_channels[0], 3, padding=1)
        model.register_to_config(in_channels=8)
        with torch.no_grad():
            outputs.append(model(torch.ones(1, 8, 8, 8), 5, torch.ones(1, 7, 24)).sample)
    assert relative(outputs[1], outputs[0]) < 1e-5


# --- promises


def test_a_boolean_mask_a_mask_of_numbers_and_a_bias_mean_the_same(
    sd15: tuple[Stock, Ours], values: dict[str, Tensor]
) -> None:
    stock, ours = sd15
    keep = torch.arange(7) < torch.tensor([[5], [2]])
    masks = [keep, keep.float(), keep.long(), (1 - keep.float())[:, None] * -10000]
    with torch.no_grad():
        outputs = [stock_call(ours, values | {"context_mask": mask}) for mask in masks]
        theirs = stock_call(stock, values | {"context_mask": keep})
        assert relative(outputs[0], theirs) < 1e-5 < 1e-2 < relative(outputs[0], stock_call(ours, values))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_what_is_masked_does_not_count(sd15: tuple[Stock, Ours], values: dict[str, Tensor]) -> None:
    mask = {"context_mask": torch.arange(7) < torch.tensor([[5], [5]])}
    other = values | {"context": torch.cat([values["context"][:, :5], torch.full((2, 2, 24), 1e3)], dim=1)}
    with torch.no_grad():
        assert torch.equal(stock_call(sd15[1], values | mask), stock_call(sd15[1], other | mask))


def test_a_self_attention_mask(sd15: tuple[Stock, Ours]) -> None:
    """For one resolution; stock pads it, in its own way, for the others."""
    config = {**NARROW["plain-mid-block"], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    stock, ours = random_pair(config)
    values = inputs(config, mask=False)
    mask = torch.arange(64) < torch.tensor([[50], [20]])
    arguments = {"attention_mask": mask, "return_dict": False}
    with torch.no_grad():
        theirs, own = (m(values["x"], 5, values["context"], **arguments)[0] for m in (stock, ours))
        assert relative(own, theirs) < 1e-5 < 1e-3 < relative(own, ours(values["x"], 5, values["context"]).sample)


# Stock says so of an adapter's residuals in the place of a ControlNet's, and takes them.
@pytest.mark.filterwarnings("ignore:Passing intrablock residual connections:FutureWarning")
@pytest.mark.parametrize("kind", ["control", "adapter", "adapter with more than fits", "old adapter"])
def test_residuals_equal_stock_and_the_callers_lists_stay_as_they_are(kind: str) -> None:
    stock, ours = random_pair(NARROW["sdxl"])
    values = inputs(NARROW["sdxl"])
    skips: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: skips.extend(out[1])) for block in ours.down_blocks]
    with torch.no_grad():
        plain = stock_call(ours, values)
        for hook in hooks:
            hook.remove()
        sizes = [(2, 20, 8, 8), *(skip.shape for skip in skips)]
        added = {"text_embeds": values["pooled"], "time_ids": values["time_ids"]}
        if kind == "control":
            given: dict[str, Any] = {"down_block_additional_residuals": [torch.randn(size) for size in sizes]}
            given["mid_block_additional_residual"] = torch.randn(sizes[-1])
        else:
            last = [torch.randn(sizes[3]), torch.randn(sizes[5]), torch.randn(sizes[8])]
            last += [torch.randn(2, 3, 1, 1)] * ("more" in kind)
            name = "down_block_additional_residuals" if "old" in kind else "down_intrablock_additional_residuals"
            given = {name: last}
        outputs = []
        for model in (stock, ours):
            own = {key: list(value) if isinstance(value, list) else value for key, value in given.items()}
            conditions = {"encoder_attention_mask": values["context_mask"], "added_cond_kwargs": added}
            outputs.append(model(values["x"], values["timestep"], values["context"], **conditions, **own).sample)
        assert {key: len(value) for key, value in own.items()} == {key: len(value) for key, value in given.items()}
    assert relative(outputs[1], outputs[0]) < 1e-5 < 1e-2 < relative(outputs[1], plain)


def wrong_inputs() -> Iterator[Any]:
    def case(name: str, key: str, value: Any, *said: str) -> Any:
        return pytest.param(name, key, value, said, id=f"{name}: {key} {'missing' if value is None else 'wrong'}")

    yield case("sd15", "context", None, "encoder_hidden_states is missing", "[B, L, 24]")
    yield case("sd15", "context", torch.ones(2, 7, 25), "encoder_hidden_states is [2, 7, 25]", "[B, L, 24]")
    yield case("sd15", "context", torch.ones(2, 24), "encoder_hidden_states is [2, 24]", "[B, L, 24]")
    yield case("sd15", "x", torch.ones(2, 9, 8, 8), "sample is [2, 9, 8, 8]", "[B, 4, H, W]")
    yield case("kolors", "context", torch.ones(2, 7, 24), "encoder_hidden_states is [2, 7, 24]", "[B, L, 20]")
    yield case("upscaler", "class_labels", None, "class_labels is missing", "[B]")
    yield case("unclip", "class_labels", None, "class_labels is missing", "[B, 12]")
    yield case("unclip", "class_labels", torch.ones(2, 13), "class_labels is [2, 13]", "[B, 12]")
    yield case("identity-classes", "class_labels", torch.ones(2, 5), "class_labels is [2, 5]", "[B, 64]")
    yield case("lcm", "guidance", torch.ones(2, 11), "timestep_cond is [2, 11]", "[B, 10]")
    yield case("sdxl", "pooled", torch.ones(2, 15), '["text_embeds"] is [2, 15]', "P + 8 * n = 64")
    yield case("sdxl", "time_ids", torch.ones(2, 5), '["time_ids"] is [2, 5]', "P + 8 * n = 64")


@pytest.mark.parametrize(("name", "key", "value", "said"), [*wrong_inputs()])
def test_a_missing_or_wrong_input_is_named_with_the_shape_it_should_have(
    name: str, key: str, value: Tensor | None, said: tuple[str, ...]
) -> None:
    ours = Ours.from_config(NARROW[name])
    given = inputs(NARROW[name], mask=False)
    assert key in given
    with pytest.raises(InputError) as refused:
        stock_call(ours, given | {key: value})
    assert all(words in str(refused.value) for words in said) and "\n" not in str(refused.value)


@pytest.mark.parametrize("added", [None, {}, {"text_embeds": torch.ones(2, 16)}], ids=["none", "empty", "no time_ids"])
def test_missing_added_cond_kwargs_are_named(added: dict[str, Tensor] | None) -> None:
    ours, given = Ours.from_config(NARROW["sdxl"]), inputs(NARROW["sdxl"])
    with pytest.raises(InputError, match=r'added_cond_kwargs\["text_embeds"\] is .* and \["time_ids"\] is missing'):
        ours(given["x"], 5, given["context"], added_cond_kwargs=added)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "upscaler"])
def test_channels_last_survives_the_whole_forward(name: str) -> None:
    ours = Ours.from_config(NARROW[name]).to(memory_format=torch.channels_last).train()
    lost: list[str] = []

    def look(module_name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            image = isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[1:]) > 1
            if image and not output.is_contiguous(memory_format=torch.channels_last):
                lost.append(module_name)

        return hook

    for module_name, module in ours.named_modules():
        module.register_forward_hook(look(module_name))
    values = inputs(NARROW[name], height=16, width=16)
    values["x"] = values["x"].to(memory_format=torch.channels_last)
    stock_call(ours, values)
    assert lost == []


# --- compilation

# SDXL's conditions on two levels with one transformer block each: dynamic sizes take dynamo minutes on larger ones.
COMPILED = {
    **NARROW["plain-mid-block"],
    "layers_per_block": 1,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


@pytest.fixture
def compiled() -> Iterator[tuple[Ours, Any, CompileCounter]]:
    torch._dynamo.reset()
    counter = CompileCounter()
    _, ours = random_pair(COMPILED)
    yield ours, torch.compile(ours, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


def call(model: Any, values: dict[str, Tensor], step: Tensor) -> Tensor:
    added = {"text_embeds": values["pooled"], "time_ids": values["time_ids"]}
    with torch.no_grad():
        output: Tensor = model(values["x"], step, values["context"], added_cond_kwargs=added, return_dict=False)[0]
    return output


def test_one_graph_for_every_step_and_prompt(compiled: tuple[Ours, Any, CompileCounter]) -> None:
    ours, graph, counter = compiled
    for seed, step in ((0, 801), (1, 401), (2, 1)):
        values = inputs(COMPILED, seed=seed, mask=False)
        t = torch.tensor(step)
        assert relative(call(graph, values, t), call(ours, values, t)) < 1e-5
    assert counter.frame_count == 1


def test_image_sizes_recompile_once(compiled: tuple[Ours, Any, CompileCounter]) -> None:
    ours, graph, counter = compiled
    counts = []
    for height, width in ((16, 16), (24, 32), (17, 23), (40, 12)):
        values = inputs(COMPILED, height=height, width=width, mask=False)
        assert relative(call(graph, values, torch.tensor(5)), call(ours, values, torch.tensor(5))) < 1e-5
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]


def test_cached_and_compiled_at_once_is_refused(compiled: tuple[Ours, Any, CompileCounter]) -> None:
    ours, graph, _ = compiled
    values = inputs(COMPILED, mask=False)
    with ours.cached(), pytest.raises(Exception, match="the one or the other"):
        call(graph, values, torch.tensor(5))


def test_the_core_and_the_drop_in_are_one_arithmetic() -> None:
    """On full-width shapes the two agree in keys; narrow ones agree to the last digits in numbers."""
    from diffusion_unet import UNetConfig

    _, ours = random_pair(NARROW["sd15"], torch.float64)
    core = UNet(UNetConfig.from_diffusers(NARROW["sd15"])).double()
    core.load_state_dict(ours.state_dict())
    values = cast(inputs(NARROW["sd15"]), torch.float64)
    with torch.no_grad():
        assert relative(stock_call(ours, values), core(**values)) < 1e-12
    with torch.device("meta"):
        assert list(Ours.from_config(SD15).state_dict()) == list(UNet(UNetConfig.from_diffusers(SD15)).state_dict())
