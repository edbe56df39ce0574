"""What other people do to the layers of a diffusers U-Net, done to ours and to the stock class.

DeepCache, ToMe, HyperTile and DAAM are stood in for by small patches that take hold of the network as those do.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from drop_in_pair import ATTENTIONS, INPUTS, Unet, assert_same, draw, pair, same
from torch import Tensor, nn

from diffusion_unet import UNet2DConditionModel as Ours


def test_a_controlnet_made_from_ours_is_the_one_made_from_stock_and_steers_alike() -> None:
    unets, controls = pair(), []
    for unet in unets:
        torch.manual_seed(1)
        controls.append(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)).eval())
    assert dict(controls[1].config) == dict(controls[0].config)
    for (name, theirs), (other, mine) in zip(*(control.state_dict().items() for control in controls), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
    for control in controls:
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):  # zero until trained
            nn.init.constant_(block.weight, 0.05)
    picture = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    outputs = []
    for unet, control in zip(unets, controls, strict=True):
        with torch.no_grad():
            down, middle = control(INPUTS["x"], INPUTS["timestep"], INPUTS["context"], picture, return_dict=False)
        outputs.append(draw(unet, down_block_additional_residuals=down, mid_block_additional_residual=middle))
    assert_same(outputs[1], outputs[0])
    assert not same(outputs[1], draw(unets[1]))


class DeepCache:
    """Stands in for DeepCache (Ma et al. 2024): what lies deep is computed at one step and reused at the next.

    It takes the place of the `forward` of layers found by the attributes of diffusers' blocks.
    """

    def __init__(self, unet: Unet) -> None:
        self.reuse, self.kept = False, {}
        first, last = unet.down_blocks[0], unet.up_blocks[-1]
        deep = [*unet.down_blocks[1].resnets, *unet.up_blocks[0].resnets, *unet.up_blocks[0].upsamplers]
        for module in [*first.downsamplers, *deep, unet.mid_block, last.resnets[0], last.attentions[0]]:
            module.forward = self._wrap(module, module.forward)

    def _wrap(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.reuse:
                self.kept[module] = forward(*args, **kwargs)
            return self.kept[module]

        return wrapped


@pytest.mark.parametrize("cached", [False, True])
def test_deep_features_are_reused_by_patches_in_the_manner_of_deepcache(cached: bool) -> None:
    outputs = []
    for unet in pair():
        whole = draw(unet, INPUTS["x"] + 1)
        runs: list[int] = []
        unet.mid_block.resnets[0].conv1.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        patch = DeepCache(unet)
        draw(unet)
        patch.reuse = True
        if cached and isinstance(unet, Ours):
            with unet.cached():
                outputs.append(draw(unet, INPUTS["x"] + 1))
        else:
            outputs.append(draw(unet, INPUTS["x"] + 1))
        assert len(runs) == 1
        assert not same(outputs[-1], whole)
    assert_same(outputs[1], outputs[0])


def merge_tokens(unet: Unet) -> None:
    """Stands in for ToMe (Bolya & Hoffman 2023): the class of every block is replaced by one that attends to fewer."""

    def patched(base: type) -> type:
        class Merging(base):
            def forward(
                self,
                hidden_states: Tensor,
                attention_mask: Tensor | None = None,
                encoder_hidden_states: Tensor | None = None,
                encoder_attention_mask: Tensor | None = None,
                timestep: Tensor | None = None,
                cross_attention_kwargs: dict[str, Any] | None = None,
                class_labels: Tensor | None = None,
                **_: Any,
            ) -> Tensor:
                height, width = self.size["size"]
                merged = self.norm1(hidden_states).unflatten(1, (-1, 2)).mean(dim=2)  # every second token
                assert merged.shape[1] in (height * width // 2, height * width // 8)
                hidden_states = hidden_states + self.attn1(merged, None).repeat_interleave(2, dim=1)
                hidden_states = hidden_states + self.attn2(
                    self.norm2(hidden_states),
                    encoder_hidden_states=encoder_hidden_states,
                    attention_mask=encoder_attention_mask,
                    **(cross_attention_kwargs or {}),
                )
                return hidden_states + self.ff(self.norm3(hidden_states))

        return Merging

    size: dict[str, Any] = {}
    unet.register_forward_pre_hook(lambda _, args: size.update(size=args[0].shape[2:]))
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.__class__ = patched(type(module))
            module.size = size


def test_tokens_are_merged_by_patches_in_the_manner_of_tome() -> None:
    stock, ours = pair()
    plain, mask = draw(ours), {"encoder_attention_mask": INPUTS["context_mask"]}
    for unet in (stock, ours):
        merge_tokens(unet)
    assert_same(draw(ours), draw(stock))
    assert_same(draw(ours, **mask), draw(stock, **mask))
    assert not same(draw(ours), plain)
    with ours.cached():
        for _ in range(2):
            assert_same(draw(ours, **mask), draw(stock, **mask))


def test_hooks_and_patched_forwards_of_attentions_run_as_with_stock() -> None:
    """In the manner of HyperTile, which cuts the image into tiles before an attention, and of DAAM's hooks."""
    outputs, seen = [], []
    for unet in pair():
        plain, shapes = draw(unet), []

        def tiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                tiles = x.unflatten(1, (2, -1)).flatten(0, 1)
                return forward(tiles, *args, **kwargs).unflatten(0, (len(x), 2)).flatten(1, 2)

            return wrapped

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: list[Any] = shapes) -> Any:
            shapes.append(tuple(kwargs["encoder_hidden_states"].shape))
            return args, kwargs | {"encoder_hidden_states": 2 * kwargs["encoder_hidden_states"]}

        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                module.forward = tiled(module.forward)
            elif name.endswith("attn2"):
                module.register_forward_pre_hook(before, with_kwargs=True)
        outputs.append(draw(unet))
        seen.append(shapes)
        assert not same(outputs[-1], plain)
    assert_same(outputs[1], outputs[0])
    assert seen[1] == seen[0] == [tuple(INPUTS["context"].shape)] * (ATTENTIONS // 2)
