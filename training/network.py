"""What is trained, put together from the settings: a new model, or a pretrained one."""

from typing import Any

import torch
from torch import Tensor, nn

from diffusion_unet.codec import PixelCodec
from diffusion_unet.conditioning import TextEncoder, new_text_encoder, train_tokenizer
from diffusion_unet.config import UNetConfig
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet

from .config import ModelConfig, ScheduleConfig
from .data import Dataset

# What captions do not give a U-Net: classes, pooled text and sizes, guidance, a context of another width.
NOT_TRAINED = ("num_class_embeds", "class_embed_type", "addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim")


class Network(nn.Module):
    """U-Net and text encoder as one module, so that there is one thing to wrap, average and save."""

    def __init__(self, model: DiffusionModel, train_text_encoder: bool):
        super().__init__()
        self.unet = model.unet
        self.text = model.text
        self.schedule = model.schedule
        self._train_text = train_text_encoder
        self.unet.requires_grad_(True)
        if self.text is not None:
            self.text.requires_grad_(train_text_encoder)

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor | None) -> Tensor:
        """The network's output [B, C, H, W] for x = x0 + sigma * noise, sigma [B], token ids [B, L]."""
        conditioning = None
        if self.text is not None and ids is not None:
            with torch.set_grad_enabled(self._train_text and torch.is_grad_enabled()):
                conditioning = self.text(ids)
        return Denoiser(self.unet, self.schedule).predict(x, sigma, conditioning)

    def train(self, mode: bool = True) -> "Network":
        """As of nn.Module, but a frozen text encoder stays as it is used: without dropout."""
        super().train(mode)
        if self.text is not None and not self._train_text:
            self.text.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def has_dropout(self) -> bool:
        """Whether a forward pass draws from torch's own generator."""
        names = ("p", "dropout", "attention_dropout")
        rates = [getattr(module, name, None) for module in self.modules() for name in names]
        return any(isinstance(rate, float) and rate > 0 for rate in rates)


def trains_text(config: ModelConfig) -> bool:
    """Whether the text encoder is trained: a new one by default, a pretrained one only when asked."""
    return config.pretrained is None if config.train_text_encoder is None else config.train_text_encoder


def refuse_other_inputs(unet: UNetConfig, key: str) -> None:
    """Raises InputError, naming the setting `key`, for a U-Net that takes more than noise, sigma and captions."""
    for name in NOT_TRAINED:
        if getattr(unet, name) is not None:
            raise InputError(f"{key}: training has nothing to give to a U-Net with {name}; it is for sampling only")


def new_channels(config: ModelConfig, resolution: int) -> int:
    """Channels of the pictures [resolution, resolution] that a new model is trained on, 1 or 3. Raises InputError."""
    unet = UNetConfig.from_diffusers(config.unet or {})
    refuse_other_inputs(unet, "model.unet")
    if unet.sample_size not in (None, resolution):
        raise InputError(
            f"model.unet.sample_size: {unet.sample_size} is not data.resolution ({resolution}), which it follows; take"
            " it out"
        )
    if unet.in_channels != unet.out_channels or unet.out_channels not in (1, 3):
        raise InputError(
            f"model.unet: in_channels {unet.in_channels} and out_channels {unet.out_channels}; training on pixels needs"
            " 1 (grey) or 3 (RGB) for both"
        )
    blocks = (*unet.down_block_types, unet.mid_block_type, *unet.up_block_types)
    if config.text_encoder and not any("CrossAttn" in (block or "") for block in blocks):
        raise InputError("model.text_encoder: the U-Net has no cross-attention that would use it; set it to null")
    return unet.out_channels


def new_model(config: ModelConfig, dataset: Dataset, seed: int) -> DiffusionModel:
    """A model with weights drawn from `seed`, tokenizer and pixel statistics from the data. Raises InputError.

    torch's own generator is left as it was."""
    settings: dict[str, Any] = {**(config.unet or {}), "sample_size": dataset.resolution}
    unet_config = UNetConfig.from_diffusers(settings)
    mean = dataset.mean if config.pixel_mean is None else config.pixel_mean
    std = dataset.std if config.pixel_std is None else config.pixel_std
    if std == 0:
        raise InputError("model.pixel_std: all pixels of all training images are equal; give 1 to train all the same")
    text = _new_text(config, dataset, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(unet_config)
    try:
        return DiffusionModel(unet, new_schedule(config.schedule), text, PixelCodec(dataset.channels, mean, std))
    except InputError as error:
        raise InputError(f"model: {error}") from None


def _new_text(config: ModelConfig, dataset: Dataset, seed: int) -> TextEncoder | None:
    if config.text_encoder is None:
        return None
    captions = (caption for captions in dataset.captions for caption in captions)
    tokenizer = train_tokenizer(captions, config.tokenizer.vocab_size, config.tokenizer.max_length)
    encoder = config.text_encoder
    return new_text_encoder(
        tokenizer,
        hidden_size=encoder.hidden_size,
        num_hidden_layers=encoder.num_hidden_layers,
        num_attention_heads=encoder.num_attention_heads,
        seed=seed,
    )


def new_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The noise schedule that the settings describe; what they leave out is the schedule's own default."""
    given = {
        "T": config.num_train_timesteps,
        "start": config.beta_start,
        "end": config.beta_end,
        "prediction_type": config.prediction_type,
        "zero_snr": config.zero_snr or None,
        "shift": config.shift,
        "sigma_data": config.sigma_data,
        "sigma_min": config.sigma_min,
        "sigma_max": config.sigma_max,
    }
    make: dict[str, Any] = {
        "linear": NoiseSchedule.linear,
        "scaled_linear": NoiseSchedule.scaled_linear,
        "cosine": NoiseSchedule.cosine,
        "flow": NoiseSchedule.flow,
        "edm": NoiseSchedule.edm,
    }
    schedule: NoiseSchedule = make[config.kind](**{key: value for key, value in given.items() if value is not None})
    return schedule
