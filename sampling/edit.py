"""Pictures that are drawn from a picture: img2img, inpainting, and networks that are shown the picture to be changed.

img2img is SDEdit (Meng et al. 2022, arXiv:2108.01073): noise is added to the picture, and taken away again. Inpainting
with a network that knows of no masks holds the known part to the picture at every noise level (as Lugmayr et al. 2022,
arXiv:2201.09865, eq. 8, without resampling). Shapes: B pictures drawn, C H W in pixels, c h w in the network's space.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from diffusion_unet.codec import LatentCodec
from diffusion_unet.conditioning import Conditioning
from diffusion_unet.errors import InputError
from diffusion_unet.images import WHITE, open_image, to_array
from diffusion_unet.model_index import INPAINT, INSTRUCT_PIX2PIX, TEXT_TO_IMAGE, task_of
from diffusion_unet.schedule import NoiseSchedule

from .levels import MAX_STEPS, sigmas

if TYPE_CHECKING:
    from diffusion_unet.model import DiffusionModel

STRENGTH = 0.8  # of img2img, where none is given
BLACK = (0, 0, 0)
HALF = 128  # of a mask: where it is as light as this, a network made for inpainting is told of it
GREY = 128  # what stands in the hole of a picture that an inpainting network is shown: 0 in [-1, 1], or nearly
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")

Picture = Path | str | bytes | Image.Image  # a file, the bytes of one, or a picture
Denoise = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """What pictures are drawn from, at the size at which they are drawn; made by `source_of`.

    pixels    uint8 [H, W, C]
    mask      uint8 [H, W]: 255 is drawn anew, 0 keeps its bytes, what lies between is blended; None draws all anew
    task      what the network is for, as `DiffusionModel.task`
    strength  in (0, 1]; 1 begins from noise alone, and lower ones from the picture with a part of the noise
    note      a line for a person, where the size of the picture could not be drawn; otherwise None
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    task: str
    strength: float
    note: str | None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def levels(self, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Tensor:
        """float64 [steps + 1], the levels of `strength_levels` at this strength."""
        return strength_levels(schedule, steps, spacing, self.strength)

    def encode(self, model: "DiffusionModel", tile: int | None = None) -> "Encoded":
        """What the network starts from. The codec is run for it here alone, however many pictures are drawn.

        x0 is the mean of the autoencoder's distribution. A draw of it, as diffusers makes, would hang each picture on
        one more random number, for a difference that is not seen. tile: as of `LatentCodec.decode`; None for pixels.
        """
        codec, device = model.codec, next(model.unet.parameters()).device
        images = torch.from_numpy(self.pixels)[None].to(device)  # [1, H, W, C]
        mask = None if self.mask is None else torch.from_numpy(self.mask)[None, None].to(device)  # [1, 1, H, W]
        told = self.task == INPAINT  # of the mask, so that nothing need be held
        held = None if mask is None or told else _at_grid(mask / 255, codec.scale_factor)
        if not isinstance(codec, LatentCodec):
            return Encoded(self.strength, codec.encode(images), held, None)
        moments, extra = codec.moments(images, tile), None
        if told and mask is not None:
            hole = mask >= HALF
            rest = codec.encode(images.masked_fill(hole.movedim(1, -1), GREY), tile=tile).to(device)
            extra = torch.cat([_at_grid(hole.float(), codec.scale_factor), rest], dim=1)
        elif self.task == INSTRUCT_PIX2PIX:  # not scaled as the latents are: so the published models have it
            extra = moments.chunk(2, dim=1)[0].to(device)
        return Encoded(self.strength, codec.sample(moments).to(device), held, extra)

    def finish(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, C], as decoded -> the same with the picture's own bytes where the mask is 0.

        Where the mask is neither 0 nor 255, the sRGB values are blended, and rounded to nearest.
        """
        if self.mask is None:
            return pixels
        weight = self.mask.astype(np.uint16)[..., None]  # [H, W, 1]; 255 * 255 + 127 fits
        return ((weight * pixels + (255 - weight) * self.pixels + 127) // 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A `Source` in the network's space. All pictures drawn from it share it, and nothing is written to it.

    strength  as of the source
    x0        [1, c, h, w]  the picture
    mask      [1, 1, h, w]  in [0, 1], the part of each place that is drawn anew; None where the network is left free
    extra     [1, n, h, w]  the network's further input channels; None where it has none
    """

    strength: float
    x0: Tensor
    mask: Tensor | None
    extra: Tensor | None

    def begin(self, noise: Tensor, sigma: float, scale: float) -> Tensor:
        """x [B, c, h, w] at the first noise level: x0 + sigma * noise.

        At strength 1 it is scale * noise, with the scale that a picture drawn from text alone begins at: what was in
        the picture, and under the mask, is then without a trace.
        """
        return scale * noise if self.strength == 1 else self.x0 + sigma * noise

    def wrap(self, denoise: Denoise, noise: Tensor) -> Denoise:
        """`denoise` with what the mask keeps known; noise: that of `begin`.

        x' = m x + (1 - m) (x0 + sigma n) goes in, and m D(x') + (1 - m) x0 comes out: to every solver it is a denoiser
        that is sure of the known part.
        """
        if self.mask is None:
            return denoise
        m, known, known_noise = self.mask, (1 - self.mask) * self.x0, (1 - self.mask) * noise

        def held(x: Tensor, sigma: float) -> Tensor:
            return m * denoise(m * x + known + sigma * known_noise, sigma) + known

        return held

    def condition(self, conditioning: Conditioning | None, rows: int) -> Conditioning | None:
        """The conditioning of `rows` pictures with the picture beside it, where the network is shown one.

        Both halves of guidance are. For InstructPix2Pix that is guidance by the text alone: the image guidance scale of
        its paper (Brooks et al. 2023, arXiv:2211.09800, eq. 3) is 1, for which the half without a picture cancels out.
        """
        if self.extra is None:
            return conditioning
        given = Conditioning() if conditioning is None else conditioning
        return replace(given, extra=self.extra.expand(rows, -1, -1, -1))


def source_of(
    model: "DiffusionModel",
    image: Picture | None = None,
    mask: Picture | None = None,
    *,
    size: tuple[int, int] | None = None,
    strength: float | None = None,
) -> Source | None:
    """Checks and opens what pictures are to be drawn from; None where that is text alone. No network is run.

    Args:
        image: the picture, as a file (any that `open_image` reads), the bytes of one, or a PIL image. It is enlarged or
            reduced to cover `size`, and what sticks out cropped away on both sides.
        mask: white where it is to be drawn anew, black where the picture stays as it is, transparent as black; of the
            picture's size. Networks made for inpainting are told of it where it is lighter than half.
        size: (height, width) in pixels that the model can draw; None is the picture's own, without the few rows and
            columns at its edges that are over a multiple of what the model draws.
        strength: how far towards noise the picture is taken before it is drawn anew, in (0, 1], see `strength_levels`.
            None is 0.8; and 1 with a mask, or for a network that is shown the picture.

    Raises InputError, one line, for a picture that cannot be used, a mask of another size, a mask or a strength without
    a picture, a strength that cannot be, and a picture or a mask that the network needs and that is not given.
    """
    task = _task(model, image, mask, strength)
    if image is None:
        return None
    if strength is None:
        strength = STRENGTH if mask is None and task == TEXT_TO_IMAGE else 1.0
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise InputError(f"strength is {strength!r}: a number above 0, and at most 1, is needed")
    picture = _open(image, model.codec.channels, "image")
    hole = None if mask is None else _open(mask, 1, "mask", BLACK)
    if hole is not None and hole.size != picture.size:
        sizes = "the mask is {}x{} and the picture {}x{}".format(*hole.size, *picture.size)
        raise InputError(f"{sizes}: make the mask as large as the picture")
    note, factor = None, model.codec.scale_factor
    if size is None:
        width, height = picture.size
        size = (max(factor, height // factor * factor), max(factor, width // factor * factor))
        if size != (height, width):
            note = f"the picture of {width}x{height} is drawn at {size[1]}x{size[0]}: sides are multiples of {factor}"
        picture, hole = _middle(picture, size), None if hole is None else _middle(hole, size)
    if hole is not None:  # by area, which makes nothing that is black any lighter
        hole = ImageOps.fit(hole, (size[1], size[0]), Image.Resampling.BOX)
    pixels = to_array(picture, size)
    return Source(pixels, None if hole is None else np.array(hole), task, float(strength), note)


def strength_levels(schedule: NoiseSchedule, steps: int, spacing: str | None, strength: float) -> Tensor:
    """float64 [steps + 1]: falling noise levels, of which the first is that of `strength`, and 0 at the end.

    diffusers plans a course of `steps` and runs the last strength * steps of it; here all steps asked for are run, and
    they are the last of a course of steps / strength. So a strength begins at the same noise level: at the timestep
    strength * T, about, and with spacings that are not of timesteps after the same share of the course. Where
    steps / strength is not whole, each level lies between its neighbours' in the courses next in length, by strength.

    Raises InputError as `sigmas`, and where a course that long cannot be had.
    """
    whole = sigmas(schedule, steps, spacing)
    if strength == 1:
        return whole
    course = steps / strength
    error = InputError(f"strength {strength} leaves no room for {steps} steps: take fewer, or more strength")
    if course > MAX_STEPS:
        raise error
    short, long = math.floor(course), math.ceil(course)
    try:
        high, low = (sigmas(schedule, length, spacing)[-steps - 1 : -1].log() for length in (short, long))
    except InputError:
        raise error from None
    weight = (strength / steps - 1 / long) * short * long  # of 1 / course between 1 / long and 1 / short
    levels = torch.lerp(low, high, weight).exp()
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def _task(model: "DiffusionModel", image: object, mask: object, strength: object) -> str:
    """What the network is for, and that what was given is what it needs."""
    config = model.unet.config
    task = task_of(config)
    network = f"the network takes {config.in_channels} channels and predicts {config.out_channels}"
    if task is None:
        raise InputError(f"{network}: it is neither text-to-image, inpainting nor InstructPix2Pix")
    if image is None:
        for name, given in (("mask", mask), ("strength", strength)):
            if given is not None:
                raise InputError(f"{name} is given, and no picture: give the image that it is for")
        if task != TEXT_TO_IMAGE:
            raise InputError(f"{network}: {task} needs a picture to start from, give it as image")
    elif task != TEXT_TO_IMAGE and not isinstance(model.codec, LatentCodec):
        raise InputError(f"{network}: {task} is known for models on latents alone, and this one is on pixels")
    elif task == INPAINT and mask is None:
        raise InputError(f"{network}: {task} needs a mask too, white where the picture is to be drawn anew")
    return task


def _open(picture: Picture, channels: int, what: str, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Mode "RGB" or "L", as `open_image`, in whichever form it is given."""
    name = f"the {what} given"
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        try:  # by way of a file, so that transparency, profiles and 16 bits are treated alike in every form
            if picture.mode in ("I", "F"):
                raise ValueError("32-bit pixels have no agreed white: give it 8 or 16 bits")
            own = picture if picture.mode in _PNG_MODES else picture.convert("RGBA")
            own.save(file, "PNG", exif=picture.getexif(), compress_level=1)
        except Exception as error:  # a picture is decoded as late as here, and decoders raise nearly everything
            raise InputError(f"{name} cannot be used: {' '.join(str(error).split())[:200]}") from error
        picture = file.getvalue()
    if isinstance(picture, bytes):
        return open_image(picture, channels, background, name=name)
    if isinstance(picture, str | Path):
        return open_image(picture, channels, background)
    raise InputError(f"{what} is a {type(picture).__name__}: a path, the bytes of a file, or a PIL image is needed")


def _middle(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Rows and columns over `size` (H, W) cut off, half of them on each side; no pixel is changed."""
    height, width = min(size[0], picture.height), min(size[1], picture.width)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _at_grid(weight: Tensor, factor: int) -> Tensor:
    """[1, 1, H, W] -> [1, 1, h, w]: each place takes the most that any of its pixels has, so that none that the mask
    touches is held to what is to go."""
    return F.max_pool2d(weight, factor)
