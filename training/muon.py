"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): steps that are orthogonal matrices."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Odd polynomials a s + b s^3 + c s^5 that take singular values towards 1 (coefficients by You Jiacheng for the first
# three of five rounds). Two rounds more cost two fifths more of the optimizer's time and give the same loss.
ROUNDS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))
# Layers that AdamW trains even where Muon trains the others, as its authors have it: the first, the last, embeddings.
OUTER = tuple(
    f"unet.{name}."
    for name in ("conv_in", "conv_out", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj")
)


def inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a weight between the U-Net's hidden layers: neither what reads the inputs nor what writes the
    output, and of two dimensions or more."""
    return parameter.ndim >= 2 and name.startswith("unet.") and not name.startswith(OUTER)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with a true "muon" go along their momentum with all its singular values made about equal.

    The parameters of such a group are weights of two dimensions or more; a convolution's count as [out, in * kernel].
    Their state is "exp_avg", the mean of the gradients [as the parameter]; decay is that of AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return super().step(closure)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Moves the group's weights, and takes their gradients away from AdamW."""
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # which AdamW wants of every state
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] += 1
            state["exp_avg"].lerp_(parameter.grad, 1 - MOMENTUM)
            ahead = parameter.grad.lerp(state["exp_avg"], MOMENTUM).flatten(1)  # Nesterov's
            by_shape[ahead.shape[0], ahead.shape[1]].append((parameter, ahead))
            parameter.grad = None
        for (rows, columns), pairs in by_shape.items():
            directions = orthogonalize(torch.stack([ahead for _, ahead in pairs]))
            scale = max(1.0, rows / columns) ** 0.5
            for (parameter, _), direction in zip(pairs, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.view(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """[N, rows, columns] -> about U V^T of each matrix's U S V^T, by Newton-Schulz iterations."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # the largest singular value is then at most 1
    for a, b, c in ROUNDS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT
