"""A diffusers pipeline for models that work on pixels, for those who use diffusers rather than `sampling`."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .codec import PixelCodec
from .conditioning import Conditioning, PromptEncoder, TextEncoder
from .errors import InputError
from .images import to_image
from .prompts import ClassLabels


class PixelTextToImagePipeline(DiffusionPipeline):
    """Text, or class, to picture without an autoencoder: a UNet2DConditionModel on pixels, any scheduler of diffusers.

    pixel_mean, pixel_std: of the training pictures' values in [-1, 1]; the network works on (value - mean) / std.
    class_names: {"0": name of class 0, ...} of a network with classes, whose prompts these names are.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - diffusers reads it from the class

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        pixel_mean: float = 0.0,
        pixel_std: float = 0.5,
        class_names: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(pixel_mean=pixel_mean, pixel_std=pixel_std, class_names=class_names)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures for `prompt`, the name of a class for a network with classes; prompt-major.

        negative_prompt: what guidance leads away from, one for all or one for each prompt.
        guidance_scale: 1 and below is none.
        height, width: in pixels, by default what the network was trained for.
        latents: standard normal [B, C, H, W] to begin with instead of a draw from `generator`.
        output_type: "pil", or "np" for uint8 [B, H, W, C].

        Raises InputError for a prompt that is too long or no class, or arguments that do not fit together.
        """
        if output_type not in ("pil", "np"):
            raise InputError(f"output_type is {output_type!r}: 'pil' or 'np' is known")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        negatives = [text for text in negatives for _ in range(num_images_per_prompt)]
        if len(negatives) == num_images_per_prompt:
            negatives = [negatives[0]] * len(prompts)
        if len(negatives) != len(prompts):
            raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
        encoder, device = self._encoder(), self._execution_device
        guided = guidance_scale > 1 and encoder is not None
        given = self._conditioning(encoder, negatives + prompts if guided else prompts)
        inputs = {"encoder_hidden_states": given.context, "class_labels": given.class_labels}

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = self._start(len(prompts), height, width, generator, latents)
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t)
            batch = torch.cat([scaled, scaled]) if guided else scaled
            output = self.unet(batch.to(self.unet.dtype), t, **inputs).sample.to(x.dtype)
            if guided:
                away, towards = output.chunk(2)
                output = away + guidance_scale * (towards - away)
            x = self.scheduler.step(output, t, x, **extra).prev_sample

        codec = PixelCodec(self.unet.config.out_channels, self.config.pixel_mean, self.config.pixel_std)
        pixels: np.ndarray = codec.decode(x).cpu().numpy()  # [B, H, W, C]
        self.maybe_free_model_hooks()
        images = [to_image(array) for array in pixels] if output_type == "pil" else pixels
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _encoder(self) -> PromptEncoder | None:
        if self.text_encoder is not None:
            return TextEncoder(self.tokenizer, self.text_encoder)
        return ClassLabels(list(self.config.class_names.values())) if self.config.class_names else None

    def _conditioning(self, encoder: PromptEncoder | None, texts: list[str]) -> Conditioning:
        if encoder is None:
            if any(texts):
                raise InputError("this model takes no text: leave the prompt empty")
            return Conditioning()
        return encoder.encode(texts).to(self._execution_device, self.unet.dtype)

    def _start(
        self,
        count: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        size = self.unet.config.sample_size
        sides = (size, size) if size is None or isinstance(size, int) else size
        shape = (count, self.unet.config.in_channels, height or sides[0], width or sides[1])
        if None in shape:
            raise InputError("the network states no size: give height and width")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents are {tuple(latents.shape)}: {shape} are needed")
        return latents.to(self._execution_device) * self.scheduler.init_noise_sigma
