"""Pictures to the space that the network works in, and back: pixels themselves, or the latents of an autoencoder.

Shapes: B batch, C picture channels, H W picture, c h w latents. Pictures are uint8 [B, H, W, C], sRGB or grey.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import cast, load_state, read_weights, write_json, write_safetensors
from .errors import InputError, NonFiniteError
from .untrusted import Field, checked, read_json

WEIGHTS = "diffusion_pytorch_model"
MAX_LEVELS = 8

VAE_FIELDS = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "norm_num_groups"), Field(int, 1, 4096)),
    **dict.fromkeys(("down_block_types", "up_block_types"), Field(str, listed=True)),
    **dict.fromkeys(("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), Field(bool)),
    "block_out_channels": Field(int, 1, 1 << 16, listed=True),
    "layers_per_block": Field(int, 1, 64),
    "act_fn": Field(str),
    "sample_size": Field(int, 1, 1 << 20),
    "scaling_factor": Field(float, 1e-9, 1e9),
    "shift_factor": Field(float, -1e9, 1e9),
    "latents_mean": Field(float, -1e9, 1e9, listed=True),
    "latents_std": Field(float, 1e-9, 1e9, listed=True),
}
_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
_OF_2022 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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

    def encode(self, images: Tensor, noise: Tensor | None = None, tile: int | None = None) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, c, h, w], H = h * scale_factor: `moments`, then `sample`."""
        return self.sample(self.moments(images, tile), noise)

    @torch.no_grad()
    def moments(self, images: Tensor, tile: int | None = None) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 2c, h, w], H = h * scale_factor: mean and log-variance of the latents.

        Both in the autoencoder's own scale; the log-variance is kept within [-30, 20]. They do not depend on noise, and
        may be computed once and kept. tile: as of `decode`. Raises InputError for pictures of another type or size.
        """
        _check_images(images, self.channels)
        if any(side % self.scale_factor for side in images.shape[1:3]):
            height, width = images.shape[1:3]
            raise InputError(f"pictures of {width}x{height}: the autoencoder needs multiples of {self.scale_factor}")
        x = images.movedim(-1, 1).to(self.vae.device, torch.float32) / 127.5 - 1

        def read(part: Tensor) -> Tensor:
            normal = self.vae.encode(part).latent_dist
            return torch.cat([normal.mean, normal.logvar], dim=1)

        return self._in_parts(read, x.to(self.vae.dtype), tile, taken=self.scale_factor)  # [B, 2c, h, w]

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
    def decode(self, x: Tensor, tile: int | None = None) -> Tensor:
        """[B, c, h, w] -> uint8 [B, H, W, 3], clamped and rounded to nearest. Raises NonFiniteError.

        tile: None runs the autoencoder on whole pictures. A side in pixels, a multiple of 4 * scale_factor, bounds the
        memory that it takes: pictures go through it one at a time, and larger ones in squares of that side, which share
        a quarter of it with their neighbours and are blended there. Each square is normalised by what it holds itself,
        so such a picture is a little another one; one of at most a square is the same. Raises InputError for others.
        """
        z = x.to(self.vae.device, torch.float32)
        z = (z / self._scale.to(z) + self._shift.to(z)).to(self.vae.dtype)
        return _to_bytes(self._in_parts(lambda part: self.vae.decode(part).sample, z, tile, made=self.scale_factor))

    def _in_parts(
        self, network: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, taken: int = 1, made: int = 1
    ) -> Tensor:
        """network(x), float32. taken, made: places a side that x and the answer have for each latent."""
        if tile is None:
            return torch.cat([network(part) for part in _apart(x)]).float()
        unit = 4 * self.scale_factor
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < unit or tile % unit:
            raise InputError(f"tile is {tile!r}: a multiple of {unit} pixels is needed")
        side = tile // self.scale_factor
        return torch.cat([_in_tiles(network, part, side, taken, made) for part in x.split(1)])

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
        vae = load_vae(Path(folder), variant)
        return cls(torch.nn.Module.to(vae, dtype=dtype or torch.float32))


def _apart(x: Tensor) -> Sequence[Tensor]:
    """On a CPU one picture at a time, which stays in its caches; elsewhere all at once."""
    return x.split(1) if x.device.type == "cpu" else (x,)


def _in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, side: int, taken: int, made: int) -> Tensor:
    """network(x [1, C, H, W]), float32, from squares of `side` latents; taken, made: see `LatentCodec._in_parts`."""
    h, w = x.shape[-2] // taken, x.shape[-1] // taken
    if max(h, w) <= side:
        return network(x).float()
    share = side // 4
    whole = x.new_zeros(0)
    for top in range(0, max(1, h - share), side - share):
        for left in range(0, max(1, w - share), side - share):
            rows, columns = (slice(start * taken, (start + side) * taken) for start in (top, left))
            part = network(x[..., rows, columns]).float()
            if not whole.numel():
                whole = part.new_zeros(*part.shape[:2], h * made, w * made)
            tall, wide = part.shape[-2:]
            weights = _ramps(tall, top > 0, top + side < h, share * made).outer(
                _ramps(wide, left > 0, left + side < w, share * made)
            )
            whole[..., top * made : top * made + tall, left * made : left * made + wide] += weights.to(part) * part
    return whole


def _ramps(length: int, rises: bool, falls: bool, share: int) -> Tensor:
    """[length]: 1, but for `share` places at a side with a neighbour, where its weight and this one's add up to 1."""
    weights, ramp = torch.ones(length), torch.arange(share) / share
    if rises:
        weights[:share] = ramp
    if falls:
        weights[-share:] = 1 - ramp
    return weights


def load_vae(folder: Path, variant: str | None) -> Any:
    """The diffusers AutoencoderKL in a folder, of the files' dtype. Raises InputError."""
    from diffusers import AutoencoderKL

    settings = vae_settings(folder / "config.json")
    try:
        with torch.device("meta"):
            vae = AutoencoderKL(**settings)
    except Exception as error:  # whatever the class raises, the settings are what is wrong
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{folder / 'config.json'}: no network can be made of it ({line})") from error
    tensors, source = read_weights(folder, WEIGHTS, variant)
    load_state(vae, {_modern(key): tensor for key, tensor in tensors.items()}, source)
    return vae


def vae_settings(path: Path) -> dict[str, Any]:
    """The fields of an AutoencoderKL's config.json, checked; others are left out. Raises InputError."""
    raw = read_json(path)
    if raw.get("_class_name") != "AutoencoderKL":
        raise InputError(f"{path} describes {ascii(raw.get('_class_name'))[:60]}: an AutoencoderKL is needed")
    settings = checked(raw, VAE_FIELDS, path)
    levels = len(settings.get("block_out_channels", [64]))
    if not 1 <= levels <= MAX_LEVELS:
        raise InputError(f"{path}: block_out_channels has {levels} levels: 1 to {MAX_LEVELS} can be worked with")
    for name, known in _BLOCKS.items():
        kinds = settings.get(name, known[:1])
        if len(kinds) != levels or not all(kind in known for kind in kinds):
            raise InputError(f"{path}: {name} is {ascii(kinds)[:80]}: {levels} of {' or '.join(known)} are needed")
    for name in ("latents_mean", "latents_std"):
        if name in settings and len(settings[name]) != settings.get("latent_channels", 4):
            raise InputError(f"{path}: {name} has {len(settings[name])} numbers: one for each of latent_channels")
    return settings


def _modern(key: str) -> str:
    """The key of an autoencoder's weight, as versions of diffusers after 2022 spell it."""
    if ".attentions." not in key or key.count(".") < 2:
        return key
    module, name, parameter = key.rsplit(".", 2)
    return f"{module}.{_OF_2022.get(name, name)}.{parameter}"


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
