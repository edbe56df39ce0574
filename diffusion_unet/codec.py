"""Pictures to the space that the network works in, and back: pixels themselves, or the latents of an autoencoder.

Shapes: B batch, C picture channels, H W picture, c h w latents. Pictures are uint8 [B, H, W, C], sRGB or grey.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import cast, read_json, write_json, write_safetensors
from .errors import InputError, NonFiniteError


@dataclass(frozen=True)
class PixelCodec:
    """The network works on pixels, brought to zero mean and unit variance.

    channels: 1 grey or 3 sRGB; mean, std: of the training pictures' values in [-1, 1]. Raises InputError for others.
    """

    channels: int
    mean: float = 0.0
    std: float = 0.5
    scale_factor = 1  # picture pixels a side for each of the network's

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise InputError(f"pictures of {self.channels} channels are not known: 1 (grey) or 3 (RGB)")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise InputError(f"pixel mean {self.mean} and std {self.std} cannot be: both finite, std above 0")

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> float32 [B, C, H, W] = (image / 127.5 - 1 - mean) / std."""
        _check_images(images, self.channels)
        x = images.movedim(-1, 1).to(torch.float32)  # [B, C, H, W]
        return (x / 127.5 - 1 - self.mean) / self.std

    def decode(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> uint8 [B, H, W, C], clamped and rounded to nearest. Raises NonFiniteError."""
        return _to_bytes(x.to(torch.float32) * self.std + self.mean)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PixelCodec":
        """Itself: it holds no tensors."""
        return self


class LatentCodec:
    """The network works on the latents of an autoencoder (Rombach et al. 2022), a diffusers AutoencoderKL.

    Latents are brought to the network's scale by the autoencoder's config: (z - shift_factor) * scaling_factor, or
    (z - latents_mean) / latents_std * scaling_factor where it has these.
    """

    channels = 3

    def __init__(self, vae: Any):
        self.vae = vae.requires_grad_(False).eval()
        config = vae.config
        if (config.in_channels, config.out_channels) != (3, 3):
            raise InputError(f"the autoencoder reads {config.in_channels} channels: 3 (RGB) are needed")
        self.scale_factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels: int = config.latent_channels
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        scale = torch.tensor(float(config.scaling_factor))
        if mean is not None and std is not None:
            self._scale = (scale / torch.tensor(std)).view(-1, 1, 1)
            self._shift = torch.tensor(mean).view(-1, 1, 1)
        else:
            self._scale = scale
            self._shift = torch.tensor(float(getattr(config, "shift_factor", None) or 0.0))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, c, h, w], H = h * scale_factor: `moments`, then `sample`."""
        return self.sample(self.moments(images), noise)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 2c, h, w], H = h * scale_factor: mean and log-variance of the latents.

        Both in the autoencoder's own scale; the log-variance is kept within [-30, 20]. They do not depend on noise, and
        may be computed once and kept. Raises InputError for pictures of another type or size.
        """
        _check_images(images, self.channels)
        if any(side % self.scale_factor for side in images.shape[1:3]):
            height, width = images.shape[1:3]
            raise InputError(f"pictures of {width}x{height}: the autoencoder needs multiples of {self.scale_factor}")
        x = images.movedim(-1, 1).to(self.vae.device, torch.float32) / 127.5 - 1
        normal = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        return torch.cat([normal.mean, normal.logvar], dim=1).float()  # [B, 2c, h, w]

    @torch.no_grad()
    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """float32 [B, 2c, h, w] -> float32 [B, c, h, w]: latents in the network's scale, where `moments` are.

        noise: standard normal [B, c, h, w], which picks one draw of the distribution; None takes its mean.
        """
        z, log_variance = moments.chunk(2, dim=1)  # [B, c, h, w] each
        if noise is not None:
            # in the autoencoder's precision, which is where diffusers takes the exponential
            std = (0.5 * log_variance.to(self.vae.dtype)).exp().float()
            z = z + std * noise.to(z)
        return (z - self._shift.to(z)) * self._scale.to(z)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """[B, c, h, w] -> uint8 [B, H, W, 3], clamped and rounded to nearest. Raises NonFiniteError."""
        z = x.to(self.vae.device, torch.float32)
        z = z / self._scale.to(z) + self._shift.to(z)
        return _to_bytes(self.vae.decode(z.to(self.vae.dtype)).sample.float())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LatentCodec":
        """Moves the autoencoder, and returns itself."""
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own speaks of modules there are not
        return self

    def save(self, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json` and `diffusion_pytorch_model[.variant].safetensors` in `folder`.

        Raises InputError for a weight that does not fit in `dtype`; SaveError."""
        folder = Path(folder)
        name = f"diffusion_pytorch_model.{variant}.safetensors" if variant else "diffusion_pytorch_model.safetensors"
        tensors = cast(self.vae.state_dict(), dtype, "the autoencoder")
        private = {"_name_or_path", "_use_default_values"}
        config = {key: value for key, value in self.vae.config.items() if key not in private}
        write_safetensors(folder / name, tensors, {"format": "pt"})
        write_json(folder / "config.json", {"_class_name": "AutoencoderKL", **config})

    @classmethod
    def load(cls, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> "LatentCodec":
        """Reads the `vae/` of a diffusers folder. Raises InputError when it is missing, damaged, or another class."""
        folder = Path(folder)
        kind = read_json(folder / "config.json").get("_class_name")
        if kind != "AutoencoderKL":
            raise InputError(f"{folder} holds {kind!a}: an AutoencoderKL is needed")
        from diffusers import AutoencoderKL

        try:
            vae, report = AutoencoderKL.from_pretrained(
                folder, variant=variant, torch_dtype=dtype, use_safetensors=True, local_files_only=True,
                low_cpu_mem_usage=False, output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # whatever the reader raises, the folder is what is wrong
            line = " ".join(str(error).split())[:200]
            raise InputError(f"{folder} cannot be read as an AutoencoderKL: {line}") from error
        wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
        if wrong:
            raise InputError(f"{folder}: the weights are not those of its config.json, beginning with {wrong[0]}")
        return cls(vae)


def _check_images(images: Tensor, channels: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != channels:
        raise InputError(
            f"pictures of {images.dtype} {tuple(images.shape)}: uint8 [B, H, W, {channels}] is what this model reads"
        )


def _to_bytes(x: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C]."""
    if not torch.isfinite(x).all():
        raise NonFiniteError("the picture holds NaN or infinity: draw in float32, or train again at a lower rate")
    return (x.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).movedim(1, -1).contiguous()
