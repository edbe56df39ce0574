"""What is put beside a model to steer it: LoRA files, ControlNets, and a picture for a prompt (IP-Adapter).

LoRA goes into the weights (lora.py). A ControlNet (Zhang et al. 2023, arXiv:2302.05543) adds what it makes of a picture
to the U-Net's skips, so the core runs as it is. An IP-Adapter (Ye et al. 2023, arXiv:2308.06721) attends to a picture
beside the text: the drop-in runs it, with diffusers' attention processors, on the core's own weights.

Shapes: B rows, C channels, H W in the network's space, L context length, D context width, T tokens of a picture.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from diffusion_unet.attention import repeated
from diffusion_unet.errors import InputError
from diffusion_unet.images import open_image, to_array
from diffusion_unet.model import DiffusionModel
from diffusion_unet.unet import UNet
from diffusion_unet.untrusted import shorten

from .lora import merged, weights_file
from .networks import load_controlnet, load_drop_in, load_image_encoder
from .record import file_entry

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffusion_unet.conditioning import Conditioning
    from diffusion_unet.config import UNetConfig

# How CLIP's image encoders were trained (Radford et al. 2021, github.com/openai/CLIP): of RGB in 0 to 1.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Lora(NamedTuple):
    """file: .safetensors, or a folder with one. scale: 1 is as it was trained."""

    file: Path | str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """FILE or FILE:scale."""
        return cls(*_scaled(text))


class Control(NamedTuple):
    """folder: of a diffusers ControlNetModel. image: RGB, laid over the whole of what is drawn."""

    folder: Path | str
    image: "Path | str | Image"
    scale: float = 1.0

    @classmethod
    def parse(cls, folder: str, image: str) -> Self:
        """FOLDER or FOLDER:scale, and the picture's file."""
        path, scale = _scaled(folder)
        return cls(path, image, scale)


class ImagePrompt(NamedTuple):
    """file: an IP-Adapter's .safetensors. encoder: the folder of the CLIP image encoder that it was trained with."""

    file: Path | str
    encoder: Path | str
    image: "Path | str | Image"
    scale: float = 1.0

    @classmethod
    def parse(cls, file: str, encoder: str, image: str) -> Self:
        """FILE or FILE:scale, the encoder's folder, and the picture's file."""
        path, scale = _scaled(file)
        return cls(path, encoder, image, scale)


@dataclass
class AdaptedModel(DiffusionModel):
    """A model with adapters, to be drawn from as any other.

    base: the model without them. record: an object for each of them, for a picture's record. picture: of an image
    prompt, what the conditional and the unconditional half attend to, [1, T, D] each.
    """

    base: DiffusionModel
    record: list[dict[str, Any]]
    picture: tuple[Tensor, Tensor] | None

    def conditioned(self, conditioning: "Conditioning", *, guiding: bool) -> "Conditioning":
        """With the tokens of the picture, or where it is not what guidance leads to of none, behind those of the text,
        where the network looks for them."""
        if self.picture is None:
            return conditioning
        context, mask = conditioning.context, conditioning.mask
        assert context is not None
        tokens = self.picture[0 if guiding else 1].to(context).expand(len(context), -1, -1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        return replace(conditioning, context=torch.cat([context, tokens], dim=1), mask=mask)


def with_adapters(
    model: DiffusionModel,
    *,
    loras: Sequence[Lora | tuple[Path | str, float]] = (),
    controlnets: Sequence[Control] = (),
    ip_adapter: ImagePrompt | None = None,
    size: tuple[int, int] | None = None,
) -> DiffusionModel:
    """`model` with adapters on it: an AdaptedModel, or `model` itself where none is given.

    `model` is left as it is and may be drawn from meanwhile; what no adapter changes is shared with it, so that it is
    to be moved to its device first. Several LoRA files add up, and several ControlNets. In guided passes both halves
    are controlled, and the unconditional one sees no picture, as in diffusers.

    size: (height, width) in pixels of what will be drawn, for the ControlNets; None is the model's own.

    Raises InputError, one line, for a file that is missing, damaged, pickled, or made for another model.
    """
    files, controlnets = [Lora(*lora) for lora in loras], [Control(*control) for control in controlnets]
    prompts = [] if ip_adapter is None else [ImagePrompt(*ip_adapter)]
    given: list[Lora | Control | ImagePrompt] = [*files, *controlnets, *prompts]
    if not given:
        return model
    for adapter in given:
        if isinstance(adapter.scale, bool) or not math.isfinite(adapter.scale):
            raise InputError(f"{adapter[0]}: a scale of {adapter.scale!r} cannot be: a finite number is needed")
    if not isinstance(model.unet, UNet):
        raise InputError("this model has a ControlNet or an IP-Adapter already: give all adapters at once")
    with torch.no_grad():
        unet, text = model.unet, model.text
        if files:
            unet, text = merged(model, [(Path(lora.file), lora.scale) for lora in files])
        network: nn.Module = unet
        picture = None
        controls = [_Controlling(unet, control, size or model.image_size, model) for control in controlnets]
        for prompt in prompts:
            network, picture = _seeing(unet, prompt)
        if controls or picture is not None:
            network = AdaptedUNet(network, unet.config, controls, 0 if picture is None else picture[0].shape[1])
    record = [_entry(adapter) for adapter in given]
    # Called as the core's network is, which is all that drawing asks of it.
    return AdaptedModel(cast(UNet, network), model.schedule, text, model.codec, model, record, picture)


def from_record(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of `with_adapters`, but for the size, of `AdaptedModel.record`, its `path`, `image` and `encoder`
    by now paths on this machine. Raises InputError for a record that is not whole."""
    found: dict[str, Any] = {"loras": [], "controlnets": [], "ip_adapter": None}
    try:
        for entry in entries:
            path, scale = entry["path"], entry["scale"]
            match entry["kind"]:
                case "lora":
                    found["loras"].append(Lora(path, scale))
                case "controlnet":
                    found["controlnets"].append(Control(path, entry["image"], scale))
                case "ip_adapter":
                    found["ip_adapter"] = ImagePrompt(path, entry["encoder"], entry["image"], scale)
                case kind:
                    raise InputError(
                        f"the record names an adapter of the kind {shorten(kind)}, which is not known here"
                    )
    except KeyError as error:
        raise InputError(f"the record of an adapter lacks its {error.args[0]}") from None
    return found


class AdaptedUNet(nn.Module):
    """A network with ControlNets beside it, called as the core's `UNet` is.

    unet: the core's, or the drop-in where there is an image prompt; the last `image_tokens` of every context are then
    the picture's.
    """

    def __init__(self, unet: nn.Module, config: "UNetConfig", controls: Sequence["_Controlling"], image_tokens: int):
        super().__init__()
        self.unet, self.config, self.image_tokens = unet, config, image_tokens
        self.controls = nn.ModuleList(controls)

    @property
    def precompute(self) -> Any:
        """The core's; None for the drop-in, which attends to a picture by a way of its own."""
        return getattr(self.unet, "precompute", None)

    def forward(
        self,
        x: Tensor,
        timestep: float | Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        cache: Any = None,
        **conditions: Tensor | None,
    ) -> Tensor:
        """x [B, C, H, W]; conditions are class_labels, pooled and time_ids; everything else as of `UNet.forward`."""
        text, mask, image = context, context_mask, None
        if self.image_tokens and context is not None:
            text, image = context.tensor_split([-self.image_tokens], dim=1)
            mask = None if context_mask is None else context_mask[:, : -self.image_tokens]
        if text is not None and (self.controls or image is not None):
            x = repeated(x, text)
        down, mid = self._residuals(x, timestep, text, mask, conditions)
        if image is None:
            more = {"context_mask": mask, "down_residuals": down, "mid_residual": mid, "cache": cache}
            return self.unet(x, timestep, text, **more, **conditions)
        added = {"text_embeds": conditions.get("pooled"), "time_ids": conditions.get("time_ids")}
        return self.unet(
            x,
            timestep,
            text,
            class_labels=conditions.get("class_labels"),
            encoder_attention_mask=mask,
            added_cond_kwargs=added | {"image_embeds": [image[:, None]]},  # one picture
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    def _residuals(
        self,
        x: Tensor,
        timestep: float | Tensor,
        text: Tensor | None,
        mask: Tensor | None,
        conditions: dict[str, Tensor | None],
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """The sum of what all ControlNets add: to each skip, and to the middle."""
        if not self.controls:
            return None, None
        if mask is not None:
            raise InputError("a ControlNet attends to the whole of the text, and some of it is masked: draw without it")
        parts = [control(x, timestep, text, **conditions) for control in self.controls]
        down, mid = parts[0]
        for more, middle in parts[1:]:
            down, mid = [a + b for a, b in zip(down, more, strict=True)], mid + middle
        return down, mid


class _Controlling(nn.Module):
    """A ControlNet with the picture that it is to follow, which is embedded once."""

    embedded: Tensor

    def __init__(self, unet: UNet, control: Control, size: tuple[int, int], model: DiffusionModel) -> None:
        super().__init__()
        self.net, self.scale, self.size = load_controlnet(Path(control.folder), unet), control.scale, size
        image = _tensor(_opened(control.image), size).to(unet.device, unet.dtype)
        embedded = self.net.controlnet_cond_embedding(image)  # [1, C, H, W]
        height, width = (side // model.codec.scale_factor for side in size)
        if (*embedded.shape[2:],) != (height, width):
            raise InputError(
                f"{control.folder}: makes {embedded.shape[3]}x{embedded.shape[2]} of a picture of {size[1]}x{size[0]},"
                f" and the U-Net draws {width}x{height}: it is a ControlNet for another model"
            )
        self.register_buffer("embedded", embedded, persistent=False)
        self.net.controlnet_cond_embedding = nn.Identity()

    def forward(
        self,
        x: Tensor,
        timestep: float | Tensor,
        text: Tensor | None,
        class_labels: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        if x.shape[2:] != self.embedded.shape[2:]:
            raise InputError(
                f"the ControlNet was given its picture for a size of {self.size[1]}x{self.size[0]}: draw that one"
            )
        residuals: tuple[list[Tensor], Tensor] = self.net(
            x[:, : self.net.config.in_channels],
            timestep,
            text,
            controlnet_cond=self.embedded,
            conditioning_scale=self.scale,
            class_labels=class_labels,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )
        return residuals


def _seeing(unet: UNet, prompt: ImagePrompt) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The drop-in with an IP-Adapter on the weights of `unet`, and the tokens of its picture and of none."""
    from diffusers.models.embeddings import ImageProjection

    path = weights_file(prompt.file)
    drop_in, projection = load_drop_in(unet, path, prompt.scale)
    encoder = load_image_encoder(Path(prompt.encoder)).to(unet.device, unet.dtype)
    pixels = clip_pixels(_opened(prompt.image), encoder.config.image_size).to(unet.device, unet.dtype)
    try:
        if isinstance(projection, ImageProjection):
            embedded = encoder(pixels).image_embeds  # [1, E]
            nothing = torch.zeros_like(embedded)
        else:  # it looks at every patch of the picture
            embedded, nothing = (
                encoder(of, output_hidden_states=True).hidden_states[-2] for of in (pixels, torch.zeros_like(pixels))
            )
        return drop_in, (projection(embedded), projection(nothing))
    except RuntimeError:
        raise InputError(
            f"{prompt.encoder}: makes of a picture what {path} was not trained for: take the image encoder that belongs"
            " to this IP-Adapter"
        ) from None


def clip_pixels(image: "Image", side: int) -> Tensor:
    """[1, 3, side, side], as CLIP's image encoders read a picture: its middle square, bicubic, normalised."""
    from PIL.Image import Resampling

    short = min(image.size)
    width, height = (side if length == short else int(side * length / short) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.resize((width, height), Resampling.BICUBIC).crop((left, top, left + side, top + side))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (_tensor(square, (side, side)) - mean) / std


def _tensor(image: "Image", size: tuple[int, int]) -> Tensor:
    """[1, 3, height, width] in 0 to 1: the picture covers `size`, and what sticks out is cut off."""
    return torch.from_numpy(to_array(image, size)).permute(2, 0, 1)[None] / 255


def _opened(image: "Path | str | Image") -> "Image":
    return open_image(image) if isinstance(image, Path | str) else image.convert("RGB")


def _entry(adapter: Lora | Control | ImagePrompt) -> dict[str, Any]:
    """As `record.ADAPTER` has it."""
    kind = {Lora: "lora", Control: "controlnet", ImagePrompt: "ip_adapter"}[type(adapter)]
    entry: dict[str, Any] = {"kind": kind, **file_entry(adapter[0]), "scale": float(adapter.scale)}
    if isinstance(adapter, ImagePrompt):
        entry["encoder"] = file_entry(adapter.encoder)
    if not isinstance(adapter, Lora):
        image = adapter.image
        if isinstance(image, Path | str):
            entry["image"] = file_entry(image)
        else:
            entry["image"] = {"sha256": hashlib.sha256(image.tobytes()).hexdigest()}
    return entry


def _scaled(text: str) -> tuple[str, float]:
    """PATH or PATH:scale; a path may hold colons of its own."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0
