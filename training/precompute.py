"""What is computed once before the first step and kept on disk: the autoencoder's moments, and encoded captions."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_unet.codec import LatentCodec
from diffusion_unet.errors import InputError

from . import cache
from .batches import Batches
from .data import Watch
from .engine import heed
from .start import with_cache

LATENTS, TEXTS = "latents", "texts"
AT_ONCE = 8  # images, or captions, that are encoded together


def keep_latents(batches: Batches, accelerator: Any, watch: Watch) -> None:
    """Has every image's moments computed, if `data.cache_latents` asks for it, and taken from then on."""
    data, codec = batches.config.data, batches.model.codec
    if not data.cache_latents:
        return
    if not isinstance(codec, LatentCodec):
        raise InputError("data.cache_latents: this model works on pixels and has no latents; take it out")
    if batches.config.model.task != "text-to-image":
        raise InputError("data.cache_latents: only with model.task text-to-image; take it out")
    dataset = batches.dataset
    crops = [data.cache_crops, data.center_crop, data.random_flip]
    transform = [dataset.fingerprint, dataset.buckets, dataset.channels, data.background, *crops]
    key = cache.fingerprint(LATENTS, cache.module_digest(codec.vae), batches.config.train.seed, transform)

    def compute(entries: Sequence[int]) -> list[dict[str, Tensor]]:
        found: dict[int, Tensor] = {}
        for _, group in groupby(sorted(entries, key=batches.bucket_of), batches.bucket_of):
            alike = list(group)
            for start in range(0, len(alike), AT_ONCE):
                heed()
                part = alike[start : start + AT_ONCE]
                found |= zip(part, codec.moments(batches.pixels(part)).cpu(), strict=True)
        return [{"moments": found[entry]} for entry in entries]

    folder = _folder(batches) / LATENTS
    batches.latents = cache.build(folder, key, batches.entries, compute, watch=watch, **_among(accelerator))


def keep_texts(batches: Batches, accelerator: Any, watch: Watch) -> None:
    """Has every caption encoded, if `data.cache_text` asks for it, and taken from then on."""
    model = batches.model
    if not batches.config.data.cache_text:
        return
    if model.text is None or not model.text.encoders:
        raise InputError("data.cache_text: this model has no text encoder; take it out")
    captions = list(dict.fromkeys(["", *(text for texts in batches.dataset.captions for text in texts)]))
    text = model.text
    key = cache.fingerprint(TEXTS, cache.module_digest(text), text.fingerprint(), captions)

    def compute(entries: Sequence[int]) -> list[dict[str, Tensor]]:
        rows: list[cache.Row] = []
        for start in range(0, len(entries), AT_ONCE):
            heed()
            part = [captions[entry] for entry in entries[start : start + AT_ONCE]]
            rows += cache.text_rows(text, part, accelerator.device, AT_ONCE)
        return [{name: value.cpu() for name, value in row.items()} for row in rows]

    folder = _folder(batches) / TEXTS
    store = cache.build(folder, key, len(captions), compute, watch=watch, **_among(accelerator))
    batches.texts = store, {caption: place for place, caption in enumerate(captions)}


def _folder(batches: Batches) -> Path:
    return Path(str(with_cache(batches.config).cache_dir))


def _among(accelerator: Any) -> dict[str, Any]:
    wait: Callable[[], None] = accelerator.wait_for_everyone
    return {"rank": accelerator.process_index, "world": accelerator.num_processes, "wait": wait}
