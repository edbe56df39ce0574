"""What the network is told, text by text: each encoded by itself, its keys and values computed once for all steps.

By itself, so that not a bit of it depends on what else is drawn. Shapes: B rows, L context length.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from diffusion_unet.conditioning import Conditioning, size_ids
from diffusion_unet.unet import Cache

from .adapters import AdaptedModel

if TYPE_CHECKING:
    from diffusion_unet.model import DiffusionModel

KEPT = 64  # texts; SD 1.5's keys and values take 8 MB each


@dataclass(frozen=True, eq=False)
class Told:
    """B rows of conditioning, None for a network without any, and what the network precomputed for them, if it does."""

    conditioning: Conditioning | None
    cache: Cache | None = None

    @property
    def same_until_text(self) -> bool:
        """Whether rows differ in nothing but the text: the network then takes an image once for several of them."""
        told = self.conditioning
        alone = told is not None and told.context is not None and not {"class_labels", "pooled", "extra"} & told.given()
        return alone and self.cache is not None

    @staticmethod
    def cat(parts: Sequence["Told"]) -> "Told":
        """All rows of `parts`, one after the other; what was precomputed is copied, and not computed again."""
        given = [part.conditioning for part in parts if part.conditioning is not None]
        caches = [part.cache for part in parts if part.cache is not None]
        if len(parts) == 1 or not given:
            return parts[0]
        conditioning = Conditioning.cat(given)
        if len(caches) < len(parts):
            return Told(conditioning)
        projections = caches[0].projections
        if {"class_labels", "pooled"} & conditioning.given():  # a row of the embedding for each
            projections = tuple(
                torch.cat(tables, dim=1) for tables in zip(*(c.projections for c in caches), strict=True)
            )
        layers = zip(*(cache.keys_values for cache in caches), strict=True)
        keys_values = tuple((torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])) for pairs in layers)
        return Told(conditioning, Cache(caches[0].timesteps, conditioning.context, projections, keys_values))


class Texts:
    """The texts of one request, to be drawn at these noise levels; of those that were asked for, the latest are kept.

    size: (height, width) in pixels. Not for several threads at once.
    """

    def __init__(self, model: "DiffusionModel", levels: Sequence[float], size: tuple[int, int]) -> None:
        self._model, self._levels, self._size = model, tuple(dict.fromkeys(levels)), size
        self._denoiser = model.denoiser()
        self._kept: OrderedDict[tuple[str | None, int, bool], Told] = OrderedDict()

    def rows(self, texts: Sequence[tuple[str | None, int]], *, guiding: bool = True) -> list[Told]:
        """A row for each text, which is read in so many chunks; None where the model has no text.

        guiding: whether it is what guidance leads to, not what it leads away from: a picture may belong to that."""
        return [self._row(text, chunks, guiding) for text, chunks in texts]

    def _row(self, text: str | None, chunks: int, guiding: bool) -> Told:
        key = text, chunks, guiding
        if key not in self._kept:
            conditioning = None if text is None else self._encode(text, chunks, guiding)
            self._kept[key] = Told(conditioning, self._denoiser.precompute(self._levels, conditioning))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _encode(self, text: str, chunks: int, guiding: bool) -> Conditioning:
        model = self._model
        assert model.text is not None
        like = next(model.unet.parameters())
        encoded = model.text.encode([text], chunks=chunks)
        if model.unet.config.addition_embed_type == "text_time":
            encoded = replace(encoded, time_ids=size_ids(self._size, (0, 0), self._size)[None])
        encoded = encoded.to(like.device, like.dtype)
        return model.conditioned(encoded, guiding=guiding) if isinstance(model, AdaptedModel) else encoded
