"""LoRA and textual inversion on the drop-in, beside diffusers' own class on the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as Stock
from drop_in_pair import INPUTS, TINY, assert_same, pair, pipeline, same
from drop_in_pair import draw as predict
from families import stock_call
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_unet.conditioning import new_text_encoder, train_tokenizer

# peft warns of every adapter after the first, which is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

RANK = 3
# One of each kind in each block: peft takes several milliseconds for a layer.
ADAPTED = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "net.2", "proj_in", "conv1", "time_emb_proj")
Matrices = dict[str, tuple[Tensor, Tensor]]  # of each layer, the one that goes down to the rank and the one back up


def draw(unet: nn.Module, **cross_attention_kwargs: Any) -> Tensor:
    return predict(unet, cross_attention_kwargs=cross_attention_kwargs or None)


def layers(unet: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return {name: layer for name, layer in unet.named_modules() if name.endswith(ADAPTED)}


def matrices(seed: int, rank: int = RANK) -> Matrices:
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, layer in layers(Stock.from_config(TINY)).items():
        out, width, *kernel = layer.weight.shape
        down = torch.randn(rank, width, *kernel, generator=g) / 8
        pairs[name] = down, torch.randn(out, rank, *[1] * len(kernel), generator=g) / 8
    return pairs


def diffusers_layout(pairs: Matrices) -> dict[str, Tensor]:
    return {
        f"unet.{name}.{letter}.weight": matrix
        for name, pair in pairs.items()
        for letter, matrix in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def kohya_layout(pairs: Matrices, alpha: float) -> dict[str, Tensor]:
    state = {}
    for name, (down, up) in pairs.items():
        flat = "lora_unet_" + name.replace(".", "_")
        state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(alpha)}
    return state


def merge(unet: nn.Module, pairs: Matrices, scale: float | Callable[[str], float]) -> None:
    """Add `scale * up @ down` to the weights themselves (Hu et al. 2021, equation 3)."""
    for name, layer in layers(unet).items():
        down, up = pairs[name]
        factor = scale(name) if callable(scale) else scale
        layer.weight.data += factor * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)


Pipes = tuple[StableDiffusionPipeline, StableDiffusionPipeline]


def with_adapters(*seeds: int) -> Pipes:
    """Pipelines with the stock class and with ours, and adapters `one` and `two` of these seeds."""
    stock, ours = map(pipeline, pair())
    for pipe in (stock, ours):
        for name, seed in zip(["one", "two"], seeds, strict=False):
            pipe.load_lora_weights(diffusers_layout(matrices(seed)), adapter_name=name)
    return stock, ours


@pytest.fixture(scope="module")
def two_adapters() -> Pipes:
    """For tests that leave nothing behind but the choice of the adapters."""
    return with_adapters(1, 2)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_file_draws_as_with_stock_and_as_if_merged_by_hand(layout: str, tmp_path: Path) -> None:
    pairs, alpha = matrices(1), RANK if layout == "diffusers" else 2.0
    save_file(
        diffusers_layout(pairs) if layout == "diffusers" else kohya_layout(pairs, alpha), tmp_path / "lora.safetensors"
    )
    stock, ours = pair()
    plain = draw(stock)
    for unet in (stock, ours):
        pipeline(unet).load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="one")
    by_hand, _ = pair()
    merge(by_hand, pairs, alpha / RANK)
    assert not same(draw(ours), plain)
    assert_same(draw(ours), draw(stock))
    assert_same(draw(ours), draw(by_hand))


def test_the_scale_of_a_call_holds_for_that_call_alone(two_adapters: Pipes) -> None:
    for pipe in two_adapters:
        pipe.set_adapters("one")
    stock, ours = (pipe.unet for pipe in two_adapters)
    by_hand, _ = pair()
    merge(by_hand, matrices(1), 0.3)
    assert_same(draw(ours, scale=0.3), draw(stock, scale=0.3))
    assert_same(draw(ours, scale=0.3), draw(by_hand))
    assert_same(draw(ours), draw(stock))
    assert not same(draw(ours), draw(by_hand))


def scale_of(name: str) -> float:
    """Of a layer, in the test below: diffusers counts residual blocks and samplers to the attention of their number."""
    known = {
        ("down_blocks.0",): 0.5,
        ("mid_block.attentions",): -0.7,
        ("up_blocks.1.attentions.0", "up_blocks.1.resnets.0"): 0.2,
        ("up_blocks.1.attentions.1", "up_blocks.1.resnets.1"): 1.4,
    }
    return next((scale for starts, scale in known.items() if name.startswith(starts)), 1.0)


def test_each_block_has_its_scale(two_adapters: Pipes) -> None:
    for pipe in two_adapters:
        pipe.set_adapters("one", {"unet": {"down": 0.5, "mid": -0.7, "up": {"block_1": [0.2, 1.4]}}})
    stock, ours = (draw(pipe.unet) for pipe in two_adapters)
    by_hand, _ = pair()
    merge(by_hand, matrices(1), scale_of)
    assert_same(ours, stock)
    assert_same(ours, draw(by_hand))


def test_several_adapters_are_mixed(two_adapters: Pipes) -> None:
    for pipe in two_adapters:
        pipe.set_adapters(["one", "two"], [0.7, -0.4])
    stock, ours = (draw(pipe.unet) for pipe in two_adapters)
    by_hand, _ = pair()
    merge(by_hand, matrices(1), 0.7)
    merge(by_hand, matrices(2), -0.4)
    assert_same(ours, stock)
    assert_same(ours, draw(by_hand))


def test_fuse_unfuse_disable_delete_and_unload() -> None:
    pipes = with_adapters(1, 2)
    keys = list(pair()[1].state_dict())
    outputs = {}

    def step(name: str, act: Callable[[StableDiffusionPipeline], Any]) -> None:
        for pipe in pipes:
            act(pipe)
        stock, ours = (pipe.unet for pipe in pipes)
        assert list(ours.state_dict()) == list(stock.state_dict())
        outputs[name] = draw(ours)
        assert_same(outputs[name], draw(stock))

    step("both", lambda pipe: pipe.set_adapters(["one", "two"]))
    step("fused", lambda pipe: pipe.fuse_lora(adapter_names=["one"]))
    step("unfused", lambda pipe: pipe.unfuse_lora())
    step("disabled", lambda pipe: pipe.unet.disable_lora())
    step("enabled", lambda pipe: pipe.unet.enable_lora())
    step("deleted", lambda pipe: pipe.delete_adapters("two"))
    step("unloaded", lambda pipe: pipe.unload_lora_weights())
    plain, only_one = draw(pair()[1]), draw(with_adapters(1)[0].unet)
    both = outputs["both"]
    expected = {"fused": only_one, "unfused": both, "disabled": plain, "enabled": both, "deleted": only_one}
    for name, output in (expected | {"unloaded": plain}).items():
        assert_same(outputs[name], output)
    assert not same(both, plain)
    assert not same(both, only_one)
    assert list(pipes[1].unet.state_dict()) == keys


def test_fused_and_unloaded_weights_are_the_merged_ones() -> None:
    pipe = with_adapters(1)[1]
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    by_hand, _ = pair()
    merge(by_hand, matrices(1), 0.5)
    state = pipe.unet.state_dict()
    for key, value in by_hand.state_dict().items():
        torch.testing.assert_close(state[key], value)
    assert_same(draw(pipe.unet), draw(by_hand))


@pytest.mark.parametrize("rank", [RANK, 2])
def test_hot_swap_leaves_the_second_lora_in_the_first_ones_place(rank: int) -> None:
    unets = pair()
    first, second = diffusers_layout(matrices(1)), diffusers_layout(matrices(2, rank))
    swapped = []
    for unet in unets:
        if rank != RANK:
            unet.enable_lora_hotswap(target_rank=RANK)
        unet.load_lora_adapter(dict(first), prefix="unet", adapter_name="one")
        before = draw(unet)
        place = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.lora_A["one"].weight
        unet.load_lora_adapter(dict(second), prefix="unet", adapter_name="one", hotswap=True)
        assert unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.lora_A["one"].weight is place
        swapped.append(draw(unet))
        assert not same(swapped[-1], before)
    by_hand, _ = pair()
    merge(by_hand, matrices(2, rank), 1)
    assert_same(swapped[1], swapped[0])
    assert_same(swapped[1], draw(by_hand))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_training_a_new_adapter_goes_as_with_stock(dora: bool) -> None:
    targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "proj_in",
        "conv1",
        "conv_shortcut",
        "time_emb_proj",
    ]
    config = LoraConfig(r=RANK, lora_alpha=2, target_modules=targets, init_lora_weights="gaussian", use_dora=dora)
    results = []
    for unet in pair():
        before = draw(unet)
        unet.requires_grad_(False)
        torch.manual_seed(1)
        unet.add_adapter(config)
        trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
        assert {name.split(".")[-3] for name in trained} >= {"lora_A", "lora_B"}
        optimizer = torch.optim.SGD(trained.values(), lr=1.0)
        for _ in range(2):  # at the first step the matrices that go up are zero, and with them the others' gradients
            optimizer.zero_grad()
            F.mse_loss(stock_call(unet.train(), INPUTS), INPUTS["x"]).backward()
            gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
            optimizer.step()
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        after = draw(unet.eval())
        assert not same(after, before)
        results.append((gradients, after))
    (theirs, stock), (mine, ours) = results
    assert list(mine) == list(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-6)
    assert_same(ours, stock)


def test_an_adapter_saved_with_ours_loads_into_stock(two_adapters: Pipes, tmp_path: Path) -> None:
    ours = two_adapters[1]
    ours.set_adapters("one")
    ours.unet.save_lora_adapter(tmp_path, adapter_name="one")
    stock, _ = pair()
    stock.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None, adapter_name="two")
    assert_same(draw(stock), draw(ours.unet))


CHANGES: dict[str, Callable[[StableDiffusionPipeline], Any]] = {
    "load": lambda pipe: pipe.load_lora_weights(diffusers_layout(matrices(2)), adapter_name="two"),
    "swap": lambda pipe: pipe.load_lora_weights(diffusers_layout(matrices(3)), adapter_name="two", hotswap=True),
    "rescale": lambda pipe: pipe.set_adapters(["one", "two"], [0.5, -0.8]),
    "disable": lambda pipe: pipe.unet.disable_lora(),
    "enable": lambda pipe: pipe.unet.enable_lora(),
    "fuse": lambda pipe: pipe.fuse_lora(lora_scale=0.3),
    "unfuse": lambda pipe: pipe.unfuse_lora(),
    "delete": lambda pipe: pipe.delete_adapters("two"),
    "unload": lambda pipe: pipe.unload_lora_weights(),
}


def test_cached_draws_follow_every_change_of_the_adapters() -> None:
    stock, ours = with_adapters(1)
    before = draw(stock.unet)
    with ours.unet.cached():
        assert_same(draw(ours.unet), before)
        for name, change in CHANGES.items():
            change(stock)
            change(ours)
            after = draw(stock.unet)
            assert same(after, before) == (name == "unfuse")  # whose scale stays, in diffusers
            assert_same(draw(ours.unet), after)
            # The scale of a call is no state of the adapters.
            assert_same(draw(ours.unet, scale=0.6), draw(stock.unet, scale=0.6))
            assert_same(draw(ours.unet), after)
            before = after


def test_textual_inversion_teaches_the_pipeline_a_word() -> None:
    pictures: list[list[Any]] = []
    for unet in pair():
        tokenizer = train_tokenizer(["a cat on a mat"], vocab_size=520, max_length=12)
        text = new_text_encoder(tokenizer, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
        torch.manual_seed(2)
        vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4)
        pipe = pipeline(unet, vae=vae, text_encoder=text.model, tokenizer=text.tokenizer)
        pipe.set_progress_bar_config(disable=True)

        def picture(pipe: StableDiffusionPipeline = pipe) -> Any:
            g = torch.Generator().manual_seed(3)
            return pipe("a <toy> on a mat", 16, 16, num_inference_steps=2, output_type="np", generator=g).images

        unknown = picture()
        learned = torch.randn(2, 24, generator=torch.Generator().manual_seed(4))  # two vectors for one word
        pipe.load_textual_inversion({"<toy>": learned})
        pictures.append([unknown, picture()])
    for stock, ours in zip(*pictures, strict=True):
        assert_same(torch.from_numpy(ours), torch.from_numpy(stock))
    assert not same(torch.from_numpy(pictures[1][0]), torch.from_numpy(pictures[1][1]))
