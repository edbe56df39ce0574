"""A whole model: network, noise schedule, text encoder, codec; saved and loaded as a diffusers folder.

    model_index.json  unet/  scheduler/  text_encoder/  tokenizer/  text_encoder_2/  tokenizer_2/  vae/  README.md

Each sub-folder is what the stock class of its name writes and reads. A model with an autoencoder is one of the
pipelines of Stable Diffusion (model_index.py); one that works on pixels is a PixelTextToImagePipeline (pipeline.py),
and its model_index.json also holds `pixel_mean`, `pixel_std`, and the `class_names` where it has classes.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from .checkpoint import load_state, write_bytes, write_json
from .codec import LatentCodec, PixelCodec
from .conditioning import PromptEncoder, TextEncoder
from .denoiser import Denoiser
from .errors import InputError, SaveError
from .model_index import INDEX, PARTS, PIPELINES, PIXELS, index_of, read_index, stored_variant, task_of
from .prompts import ClassLabels, DualTextEncoder
from .schedule import NoiseSchedule
from .unet import UNet
from .untrusted import read_json


@dataclass
class DiffusionModel:
    """Everything that drawing from a prompt needs. `text` is None where the network is conditioned on nothing.

    Raises InputError, at construction, for parts that are not of one model.
    """

    unet: UNet
    schedule: NoiseSchedule
    text: PromptEncoder | None
    codec: PixelCodec | LatentCodec

    def __post_init__(self) -> None:
        width, taken = self.text and self.text.width, _context_width(self.unet)
        if width != taken and taken is not None:
            given = f"a text encoder of width {width}" if width else "no text encoder"
            raise InputError(
                f"the U-Net takes a context of width {taken}, and there is {given}: use those of one model"
            )
        channels = self.codec.latent_channels if isinstance(self.codec, LatentCodec) else self.codec.channels
        if self.unet.config.out_channels != channels:
            raise InputError(f"the U-Net predicts {self.unet.config.out_channels} channels, the codec has {channels}")
        if isinstance(self.codec, LatentCodec) and width is None:
            raise InputError("a model on latents is drawn from text alone: give it a text encoder, or train on pixels")
        self._check_embeddings()

    def _check_embeddings(self) -> None:
        """That the pooled text and the classes are those which the U-Net adds to its time embedding."""
        config, pooled = self.unet.config, self.text and self.text.pooled_width
        added = config.projection_class_embeddings_input_dim if config.addition_embed_type else None
        taken = None if added is None else added - 6 * (config.addition_time_embed_dim or 0)  # six sizes
        if pooled != taken:
            given = "no text encoder that gives one" if pooled is None else f"a text encoder that gives one of {pooled}"
            wants = "no pooled text" if taken is None else f"a pooled text of width {taken} and six sizes"
            raise InputError(f"the U-Net takes {wants}, and there is {given}: use those of one model")
        classes = config.num_class_embeds if config.class_embed_type is None else None
        names = self.class_names
        if classes != (None if names is None else len(names) + 1):
            given = "no class names" if names is None else f"{len(names)} class names"
            raise InputError(
                f"the U-Net has {classes or 'no'} classes, and there are {given}: num_class_embeds is one more than the"
                " names, for the null class"
            )

    @property
    def task(self) -> str:
        """What it draws from: "text-to-image", "inpaint" or "instruct-pix2pix". Raises InputError for others."""
        task = task_of(self.unet.config)
        if task is None:
            channels = self.unet.config.in_channels
            raise InputError(
                f"the U-Net takes {channels} channels and predicts {self.unet.config.out_channels}: that is neither"
                " text-to-image, inpainting nor InstructPix2Pix"
            )
        return task

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of a class-conditional model; these are its prompts. The last of the U-Net's classes, null, has no name."""
        return self.text.names if isinstance(self.text, ClassLabels) else None

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels of the pictures it was trained for. Raises InputError where its config does not say."""
        size = self.unet.config.sample_size
        if size is None:
            raise InputError("the U-Net's config.json states no sample_size: give the size to draw")
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.codec.scale_factor, width * self.codec.scale_factor

    def denoiser(self) -> Denoiser:
        """(x, sigma, conditioning) -> denoised x, all in the codec's space."""
        return Denoiser(self.unet, self.schedule)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves every part, and returns itself."""
        for part in (self.unet, self.text, self.codec):
            if part is not None:
                part.to(device=device, dtype=dtype)
        return self

    def fingerprint(self) -> str:
        """sha256 (hex) over all weights, as they are in memory, and settings; reads every weight once."""
        digest = hashlib.sha256()
        vae = self.codec.vae if isinstance(self.codec, LatentCodec) else None
        pixels = (self.codec.mean, self.codec.std) if isinstance(self.codec, PixelCodec) else None
        settings = [self.unet.config.to_diffusers(), self.schedule.to_config(), pixels]
        digest.update(json.dumps(settings, sort_keys=True).encode())
        if self.text is not None:
            digest.update(self.text.vocabulary())
        for part in (self.unet, self.text, vae):
            for key, value in sorted(part.state_dict().items()) if part is not None else ():
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(
        self,
        folder: Path | str,
        *,
        card: str | None = None,
        files: Mapping[str, bytes] | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Writes the model folder whole or not at all; a model there already is replaced once the new one is whole.

        card: the text of README.md; files: others that go with it, by name (the card's pictures).
        variant: "fp16" writes `diffusion_pytorch_model.fp16.safetensors` ...; dtype: of the weights written, None as
        they are.

        Returns the folder. Raises InputError when `folder` is something else than a model folder or holds anything
        else besides, a weight does not fit `dtype`, or no pipeline would load it; SaveError when it cannot be written.
        """
        folder, index = Path(folder), index_of(self)
        with _replaced(folder, PARTS.union(files or ())) as partial:
            _cast(self.unet, dtype).save_pretrained(partial / "unet", variant=variant)
            write_json(partial / "scheduler" / "scheduler_config.json", self.schedule.to_config())
            if self.text is not None:
                self.text.save(partial, variant=variant, dtype=dtype)
            if isinstance(self.codec, LatentCodec):
                self.codec.save(partial / "vae", variant=variant, dtype=dtype)
            for name, data in (files or {}).items():
                write_bytes(partial / name, data)
            if card is not None:
                write_bytes(partial / "README.md", card.encode())
            write_json(partial / INDEX, index)
        return folder

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        config: Path | str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Reads a folder that `save` wrote, or one of Stable Diffusion 1.x, 2.x or XL, in eval mode.

        path: the folder, or a single .safetensors file in the original layout of these. config: for a single file
        alone, a folder as above whose configs and tokenizers are those of the file; its weights are not read.

        variant None takes plain weights, or the one variant that is there. dtype None keeps that of the files. Raises
        InputError, one line that names the file, when a part is missing,
        damaged, of another architecture, or of a class that is not known here. No code is taken from the folder.
        """
        path = Path(path)
        if config is not None or path.suffix == ".safetensors":
            from .original import load_original

            model = cls(*load_original(path, config, dtype))
            return model.to(device) if device is not None else model
        index, variant = read_index(path), variant or stored_variant(path)
        text = _load_text(path, index, variant, dtype)
        unet = UNet.from_pretrained(path, subfolder="unet", variant=variant, dtype=dtype)
        settings = read_json(path / "scheduler" / "scheduler_config.json")
        codec: PixelCodec | LatentCodec
        try:
            if index["_class_name"] == PIXELS:
                codec = PixelCodec(unet.config.out_channels, float(index["pixel_mean"]), float(index["pixel_std"]))
            else:
                codec = LatentCodec.load(path / "vae", variant=variant, dtype=dtype)
            model = cls(unet, NoiseSchedule.from_config(settings), text, codec)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return model.to(device) if device is not None else model


def _load_text(
    folder: Path, index: dict[str, Any], variant: str | None, dtype: torch.dtype | None
) -> PromptEncoder | None:
    name = index["_class_name"]
    if name in PIPELINES and PIPELINES[name].xl:
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return DualTextEncoder.load(folder, zeros_for_empty=zeros, variant=variant, dtype=dtype)
    if index.get("text_encoder", [None, None]) != [None, None]:
        return TextEncoder.load(folder, variant=variant, dtype=dtype)
    if name == PIXELS and index.get("class_names") is not None:
        try:
            return ClassLabels(list(index["class_names"].values()))
        except InputError as error:
            raise InputError(f"{folder / INDEX}: {error}") from None
    return None


def _context_width(unet: UNet) -> int | None:
    config = unet.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    if isinstance(width, tuple):
        width = next((w for w in width if w is not None), None)
    names = (*config.down_block_types, config.mid_block_type, *config.up_block_types)
    attends = any("CrossAttn" in (name or "") for name in names)
    return width if attends else None


def _cast(unet: UNet, dtype: torch.dtype | None) -> UNet:
    """The same network in `dtype`, the given one untouched. Raises InputError where a weight overflows."""
    if dtype is None or dtype == unet.dtype:
        return unet
    tensors = {key: value.detach().to(dtype) for key, value in unet.state_dict().items()}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise InputError(f"the U-Net's {key} does not fit in {dtype}: save in bfloat16 or float32")
    with torch.device("meta"):
        cast = UNet(unet.config)
    load_state(cast, tensors, "the cast weights")
    return cast


@contextlib.contextmanager
def _replaced(folder: Path, known: frozenset[str]) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when the block ends well and is removed when it does not.

    Raises InputError where `folder` holds something that is not `known`: it would be lost."""
    folder = folder.resolve()
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / INDEX).is_file():
        raise InputError(f"{folder} exists and is no model folder: name another, nothing is overwritten")
    partial, old = folder.with_name(f".{folder.name}.{os.getpid()}.partial"), folder.with_name(f".{folder.name}.old")
    try:
        if old.is_dir() and not folder.exists():  # a process ended between the two renames below
            old.rename(folder)
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.exists() else []
        if foreign:
            raise InputError(
                f"{folder / foreign[0]} is no part of a model and would be lost: move it, or name another folder"
            )
        if old.exists():
            shutil.rmtree(old)
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
            if leftover == partial or not _is_running(leftover.name.split(".")[-2]):
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        yield partial
        for part in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            sync_folder(part)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        sync_folder(folder.parent)
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
