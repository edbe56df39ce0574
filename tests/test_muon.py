"""Muon beside singular value decompositions, and the groups that it shares with AdamW."""

import pytest
import torch
from torch import nn

from training.config import OptimizerConfig
from training.muon import MOMENTUM, Muon, orthogonalize
from training.optimizer import make_optimizer, state_tensors


def polar(matrix: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def along(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two matrices."""
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_orthogonalised_matrices_lie_along_the_nearest_orthogonal_ones(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    matrices *= torch.logspace(-1.5, 0, shape[0])[:, None]  # singular values of many sizes
    matrices *= torch.tensor([1e-4, 1, 1e4])[:, None, None]
    for matrix, found in zip(matrices, orthogonalize(matrices), strict=True):
        values, exact = torch.linalg.svdvals(found), polar(matrix)
        assert values.max() < 1.3 and values.median() > 0.6
        assert along(found, exact) > max(0.9, along(matrix, exact) + 0.03)


def test_the_first_step_of_a_convolution_is_that_of_its_flattened_weight() -> None:
    weight = nn.Parameter(torch.randn(24, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    before, gradient = weight.detach().clone(), torch.randn(24, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    optimizer = Muon([{"params": [weight], "muon": True}], lr=0.1, weight_decay=0.5)
    weight.grad = gradient.clone()
    optimizer.step()
    ahead = gradient * (1 - MOMENTUM + MOMENTUM * (1 - MOMENTUM))
    direction = orthogonalize(ahead.flatten(1)[None])[0].view_as(weight)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5) - 0.1 * direction)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], gradient * (1 - MOMENTUM))


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {
        "unet.conv_in.weight": (4, 1, 3, 3),
        "unet.time_embedding.linear_1.weight": (8, 4),
        "unet.mid_block.resnets.0.conv1.weight": (4, 4, 3, 3),
        "unet.mid_block.resnets.0.conv1.bias": (4,),
        "unet.conv_out.weight": (1, 4, 3, 3),
        "text.model.embeddings.weight": (6, 4),
        "uncertainty.linear.weight": (1, 8),
    }
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def test_only_weights_between_the_first_and_the_last_layer_are_muons() -> None:
    given = parameters()
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-3, text_encoder_lr=1e-4, muon_lr=0.01), given, torch.device("cpu")
    )
    names = {id(parameter): name for name, parameter in given.items()}
    found = {group["peak"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}
    assert found == {
        1e-3: [name for name in given if ("mid_block" not in name and "text" not in name) or "bias" in name],
        1e-4: ["text.model.embeddings.weight"],
        0.01: ["unet.mid_block.resnets.0.conv1.weight"],
    }
    for parameter in given.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kinds = {key.partition(".")[::2] for key in state_tensors(optimizer, given)[0]}
    assert {kind for kind, name in kinds if name == "unet.mid_block.resnets.0.conv1.weight"} == {"step", "exp_avg"}
    assert {kind for kind, name in kinds if name == "unet.conv_in.weight"} == {"step", "exp_avg", "exp_avg_sq"}


def test_without_muon_it_is_adamw_bit_for_bit() -> None:
    results = []
    for kind in ("ours", "torch"):
        given = parameters()
        if kind == "ours":
            optimizer: torch.optim.Optimizer = make_optimizer(
                OptimizerConfig(learning_rate=0.01), given, torch.device("cpu")
            )
        else:
            optimizer = torch.optim.AdamW(given.values(), lr=0.01, weight_decay=0.01, fused=True)
        for seed in range(3):
            torch.manual_seed(seed)
            for parameter in given.values():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append(given)
    for name, parameter in results[0].items():
        assert torch.equal(parameter, results[1][name])
