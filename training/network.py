"""What is trained, put together from the settings: a new model, or a pretrained one, or a small part beside it."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_unet.attention import Transformer2DModel
from diffusion_unet.codec import LatentCodec, PixelCodec
from diffusion_unet.conditioning import Conditioning, TextEncoder, new_text_encoder, train_tokenizer
from diffusion_unet.config import UNetConfig
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.errors import InputError
from diffusion_unet.layers import ResnetBlock2D
from diffusion_unet.model import DiffusionModel
from diffusion_unet.prompts import ClassLabels
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet

from .adapters import add_lora, add_tokens, widen_conv_in
from .checks import trains_text
from .config import Config, ModelConfig, ScheduleConfig
from .data import Dataset, Told
from .uncertainty import Uncertainty

# What neither captions nor classes nor pictures give a U-Net.
NOT_TRAINED = ("class_embed_type", "time_cond_proj_dim", "encoder_hid_dim")


class Network(nn.Module):
    """U-Net and text encoder as one module, so that there is one thing to wrap, average and save."""

    def __init__(self, model: DiffusionModel, config: Config):
        super().__init__()
        self.unet = model.unet
        self.text = model.text
        self.schedule = model.schedule
        self._train_text = trains_text(config.model)
        if config.model.adapter is not None:
            self._train_text = bool(config.model.train_text_encoder)
        elif config.model.textual_inversion is not None:
            self._train_text = True
        else:
            self.unet.requires_grad_(True)
            if self.text is not None:
                self.text.requires_grad_(self._train_text)
        self.uncertainty = Uncertainty() if config.objective.learned_weighting else None
        if config.train.gradient_checkpointing:
            for module in self.unet.modules():
                if isinstance(module, ResnetBlock2D | Transformer2DModel):
                    forward = partial(checkpoint, module.forward, use_reentrant=False)
                    module.forward = forward  # type: ignore[method-assign]

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        ids: Tensor | None = None,
        *,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output [B, C, H, W] for x = x0 + sigma * noise, sigma [B], and the logarithm [B] of what loss
        is usual at sigma, where that is learned.

        ids: what `model.text` takes; context [B, L, D] and pooled [B, P] stand for it where the text is encoded.
        time_ids [B, 6]; extra [B, c, H, W], further input channels."""
        conditioning = Conditioning(context=context, pooled=pooled)
        if self.text is not None and ids is not None:
            with torch.set_grad_enabled(self._train_text and torch.is_grad_enabled()):
                conditioning = self.text(ids)
        conditioning = replace(conditioning, time_ids=time_ids, extra=extra)
        output = Denoiser(self.unet, self.schedule).predict(x, sigma, conditioning)
        return output, None if self.uncertainty is None else self.uncertainty(sigma.to(x.device))

    def train(self, mode: bool = True) -> "Network":
        """As of nn.Module, but a frozen text encoder stays as it is used: without dropout."""
        super().train(mode)
        if self.text is not None and not self._train_text:
            self.text.eval()
        return self

    def shrink_frozen(self, precision: str) -> None:
        """Holds the weights that are not trained in the number format of the forward pass: half of the memory."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        for parameter in self.parameters() if dtype is not None else ():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def has_dropout(self) -> bool:
        """Whether a forward pass draws from torch's own generator."""
        names = ("p", "dropout", "attention_dropout")
        rates = [getattr(module, name, None) for module in self.modules() for name in names]
        return any(isinstance(rate, float) and rate > 0 for rate in rates)


def load_pretrained(config: ModelConfig) -> DiffusionModel:
    """The model that `model.pretrained` names, float32. Raises InputError."""
    assert config.pretrained is not None
    if Path(config.pretrained).suffix == ".safetensors" and config.pretrained_config is None:
        raise InputError(
            f"model.pretrained_config is missing: {config.pretrained} holds weights alone; name the model folder whose"
            " configs and tokenizers are its own"
        )
    try:
        model = DiffusionModel.load(config.pretrained, config=config.pretrained_config, dtype=torch.float32)
    except InputError as error:
        raise InputError(f"model.pretrained: {error}") from None
    refuse_other_inputs(model.unet.config, "model.pretrained")
    return model


def fit_to_task(model: DiffusionModel, config: Config) -> DiffusionModel:
    """The model with the inputs of `model.task`, and the adapter or the new word beside it. Raises InputError."""
    task, channels = config.model.task, model.unet.config.out_channels
    wanted = {"text-to-image": channels, "inpaint": 2 * channels + 1, "instruct-pix2pix": 2 * channels}[task]
    if task != "text-to-image" and not isinstance(model.codec, LatentCodec):
        raise InputError(f"model.task: {task} is for models with an autoencoder, and this one works on pixels")
    if model.unet.config.in_channels != wanted:
        if model.unet.config.in_channels != channels:
            raise InputError(
                f"model.task: the U-Net takes {model.unet.config.in_channels} channels, and {task} has {wanted}"
            )
        if config.model.adapter is not None or config.model.textual_inversion is not None:
            raise InputError(
                f"model.task: the U-Net does not take the inputs of {task} yet, and neither an adapter nor a new word"
                " trains those: fine-tune the whole model first"
            )
        model.unet = widen_conv_in(model.unet, wanted)
    if config.model.pretrained and config.model.schedule != ScheduleConfig():
        model.schedule = new_schedule(config.model.schedule)
    seed = config.train.seed
    if config.model.adapter is not None:
        add_lora(model, config.model.adapter, text=bool(config.model.train_text_encoder), seed=seed)
    if config.model.textual_inversion is not None:
        model.unet.requires_grad_(False)
        add_tokens(model, config.model.textual_inversion)
    return model


def told_by(config: ModelConfig, pretrained: DiffusionModel | None) -> Told:
    """What the network is told of an image."""
    if pretrained is not None:
        kind = pretrained.text
        return "nothing" if kind is None else "label" if isinstance(kind, ClassLabels) else "caption"
    if (config.unet or {}).get("num_class_embeds") is not None:
        return "label"
    return "caption" if config.text_encoder or config.pretrained_text_encoder else "nothing"


def refuse_other_inputs(unet: UNetConfig, key: str) -> None:
    """Raises InputError, naming the setting `key`, for a U-Net that takes what training has not."""
    for name in NOT_TRAINED:
        if getattr(unet, name) is not None:
            raise InputError(f"{key}: training has nothing to give to a U-Net with {name}; it is for sampling only")
    if unet.addition_embed_type not in (None, "text_time"):
        kind = unet.addition_embed_type
        raise InputError(
            f"{key}: training has nothing to give to a U-Net with {kind} embeddings; it is for sampling only"
        )


def unet_config(config: ModelConfig, **more: Any) -> UNetConfig:
    """The U-Net that `model.unet` describes, with `more` of its settings. Raises InputError."""
    try:
        return UNetConfig.from_diffusers({**(config.unet or {}), **more})
    except InputError as error:
        raise InputError(f"model.unet: {error}") from None


def new_channels(config: ModelConfig, resolution: int) -> int:
    """Channels of the pictures that a new model is trained on, 1 or 3. Raises InputError."""
    unet = unet_config(config)
    refuse_other_inputs(unet, "model.unet")
    blocks = (*unet.down_block_types, unet.mid_block_type, *unet.up_block_types)
    own_text = config.text_encoder and not config.pretrained_text_encoder
    if own_text and not any("CrossAttn" in (block or "") for block in blocks):
        raise InputError("model.text_encoder: the U-Net has no cross-attention that would use it; set it to null")
    if config.vae is not None:
        return LatentCodec.channels
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
    return unet.out_channels


def new_model(config: Config, dataset: Dataset) -> DiffusionModel:
    """A model with weights drawn from the run's seed, tokenizer and pixel statistics from the data. Raises InputError.

    torch's own generator is left as it was."""
    model, seed = config.model, config.train.seed
    codec: PixelCodec | LatentCodec
    codec = pixel_codec(model, dataset) if model.vae is None else LatentCodec.load(Path(model.vae), dtype=torch.float32)
    settings = unet_config(model, sample_size=config.data.resolution // codec.scale_factor)
    text = new_text(model, settings, dataset, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(settings)
    try:
        return DiffusionModel(unet, new_schedule(model.schedule), text, codec)
    except InputError as error:
        raise InputError(f"model: {error}") from None


def pixel_codec(config: ModelConfig, dataset: Dataset) -> PixelCodec:
    """Of the images' statistics, or those that are set. Raises InputError."""
    mean = dataset.mean if config.pixel_mean is None else config.pixel_mean
    std = dataset.std if config.pixel_std is None else config.pixel_std
    if std == 0:
        raise InputError("model.pixel_std: all pixels of all training images are equal; give 1 to train all the same")
    if math.isnan(mean) or math.isnan(std):
        raise InputError("data.look: quick measures no pixels; take full, or give model.pixel_mean and model.pixel_std")
    return PixelCodec(dataset.channels, mean, std)


def new_text(config: ModelConfig, unet: UNetConfig, dataset: Dataset, seed: int) -> Any:
    """What a new U-Net is told by: classes, a pretrained text encoder, a new one, or nothing. Raises InputError."""
    if unet.num_class_embeds is not None:
        names = sorted({caption for captions in dataset.captions for caption in captions})
        if unet.num_class_embeds != len(names) + 1:
            raise InputError(
                f"model.unet.num_class_embeds: {unet.num_class_embeds}, and the data has {len(names)} classes: give"
                f" {len(names) + 1}, for there is one more that stands for none"
            )
        return ClassLabels(tuple(names))
    if config.pretrained_text_encoder is not None:
        return TextEncoder.load(config.pretrained_text_encoder, dtype=torch.float32)
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
