"""A network and a noise schedule together: (x, sigma, conditioning) -> the expected clean picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import repeated
from .schedule import NoiseSchedule, Scaling, match_shape

if TYPE_CHECKING:
    from .conditioning import Conditioning


@dataclass(frozen=True)
class Denoiser:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, arXiv:2206.00364, eq. 7)."""

    unet: nn.Module
    schedule: NoiseSchedule

    def __call__(
        self, x: Tensor, sigma: Tensor | float, conditioning: "Conditioning | None" = None, *, cache: Any = None
    ) -> Tensor:
        """Expected x0 given x = x0 + sigma * noise.

        x [B, C, H, W], any float dtype; sigma a number, or [B]; the answer has x's shape and dtype. `cache` is what
        `precompute` returned for this very conditioning, and then sigma is a number out of those it was given; with it
        the answer may have n * B rows, see `UNet.forward`.
        """
        scaling = self.schedule.scaling(sigma)
        output = self._run(x, scaling, conditioning, cache)
        return match_shape(scaling.c_skip, x) * repeated(x, output) + match_shape(scaling.c_out, x) * output

    def predict(self, x: Tensor, sigma: Tensor | float, conditioning: "Conditioning | None" = None) -> Tensor:
        """The network's own output in x's dtype, to hold against `NoiseSchedule.target`; arguments as `__call__`."""
        return self._run(x, self.schedule.scaling(sigma), conditioning, None)

    def _run(self, x: Tensor, scaling: Scaling, conditioning: "Conditioning | None", cache: Any) -> Tensor:
        timestep: Tensor | float = scaling.c_noise.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)
        if scaling.c_noise.ndim == 0:  # a plain number is the key under which a cache holds its time embedding
            timestep = float(scaling.c_noise)
        context, inputs = _inputs(conditioning)
        inputs |= {} if cache is None else {"cache": cache}
        scaled = (match_shape(scaling.c_in, x) * x).to(next(self.unet.parameters(), x).dtype)
        if conditioning is not None:
            inputs["context_mask"] = conditioning.mask
            if conditioning.extra is not None:
                scaled = torch.cat([scaled, conditioning.extra.to(scaled.dtype)], dim=1)
        return self.unet(scaled, timestep, context, **inputs).to(x.dtype)

    def precompute(self, sigmas: Sequence[float], conditioning: "Conditioning | None" = None) -> Any:
        """What the network needs once per trajectory rather than once per step; None where it offers no such thing.

        The conditioning must then be passed on as it is: the cache belongs to its tensors, not to their values.
        """
        timesteps = [float(self.schedule.timestep(sigma)) for sigma in sigmas]
        context, inputs = _inputs(conditioning)
        precompute: Any = getattr(self.unet, "precompute", None)
        return precompute and precompute(context, timesteps, **inputs)


def _inputs(conditioning: "Conditioning | None") -> tuple[Tensor | None, dict[str, Tensor | None]]:
    """The context, and the network's other inputs by name."""
    if conditioning is None:
        return None, {}
    names = ("class_labels", "pooled", "time_ids")
    return conditioning.context, {name: getattr(conditioning, name) for name in names}
