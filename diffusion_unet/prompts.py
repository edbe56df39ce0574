"""Prompts that are not read by one text encoder alone: the two of Stable Diffusion XL, and names of classes.

Shapes: B batch, L context length, D context width, P width of the pooled text.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .clip import load_model, load_tokenizer
from .conditioning import Conditioning, PromptEncoder, TextEncoder
from .errors import InputError
from .untrusted import shorten


class DualTextEncoder(PromptEncoder):
    """The two text encoders of Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952, section 2.1).

    first: around a CLIPTextModel; second: around a CLIPTextModelWithProjection. Both read the same prompt.
    zeros_for_empty: the empty prompt is all zeros instead of what the encoders say to it, as the model was trained;
    `force_zeros_for_empty_prompt` in its model_index.json. Raises InputError when the two do not fit.
    """

    width: int
    pooled_width: int

    def __init__(self, first: TextEncoder, second: TextEncoder, *, zeros_for_empty: bool = True):
        super().__init__()
        if not hasattr(second.model, "text_projection"):
            raise InputError("the second text encoder has no text_projection: a CLIPTextModelWithProjection is needed")
        if first.max_length != second.max_length:
            lengths = f"{first.max_length} and {second.max_length}"
            raise InputError(f"the text encoders read {lengths} tokens: take both from the same model")
        self.first, self.second, self.zeros_for_empty = first, second, zeros_for_empty
        self.max_length = first.max_length
        self.width = first.width + second.width
        config: Any = second.model.config
        self.pooled_width = config.projection_dim
        self._empty = self.tokenize([""])[0]  # [1, 2, L]

    @property
    def encoders(self) -> dict[str, TextEncoder]:
        return {"text_encoder": self.first, "text_encoder_2": self.second}

    def tokenize(self, captions: Sequence[str], *, chunks: int = 1, refuse_long: bool = False) -> tuple[Tensor, int]:
        """Token ids [B * chunks, 2, L] (int64), of both tokenizers; otherwise as `TextEncoder.tokenize`."""
        encoders = self.encoders.values()
        parts = [encoder.tokenize(captions, chunks=chunks, refuse_long=refuse_long) for encoder in encoders]
        return torch.stack([ids for ids, _ in parts], dim=1), max(cut for _, cut in parts)

    def chunks(self, *prompts: str) -> int:
        return max(encoder.chunks(*prompts) for encoder in self.encoders.values())

    def forward(self, ids: Tensor) -> Conditioning:
        """ids [B, 2, L] -> the last but one hidden states of both, side by side, as context, and the second's
        projected text as pooled. The rows of the empty prompt are zeros where the model was trained so."""
        ids = ids.to(next(self.parameters()).device)
        first = self.first.model(ids[:, 0], output_hidden_states=True)
        second = self.second.model(ids[:, 1], output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)  # [B, L, D]
        pooled = second.text_embeds  # [B, P]
        if self.zeros_for_empty:
            said = (ids != self._empty.to(ids.device)).flatten(1).any(dim=1)
            context, pooled = said[:, None, None] * context, said[:, None] * pooled
        return Conditioning(context=context, pooled=pooled)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of nn.Module, but what lies behind the first's last but one layer, which nothing reads, stays frozen."""
        super().requires_grad_(requires_grad)
        inner: Any = getattr(self.first.model, "text_model", self.first.model)
        for unread in (inner.encoder.layers[-1], inner.final_layer_norm):
            unread.requires_grad_(False)
        return self

    def vocabulary(self) -> bytes:
        parts = [encoder.vocabulary() for encoder in self.encoders.values()]
        return b"\0".join([*parts, str(self.zeros_for_empty).encode()])

    def save(self, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Writes `text_encoder/`, `tokenizer/`, `text_encoder_2/` and `tokenizer_2/`; errors as of `TextEncoder`."""
        self.first.save_as(Path(folder), "", variant, dtype)
        self.second.save_as(Path(folder), "_2", variant, dtype)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        zeros_for_empty: bool = True,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Reads what `save` writes, and those folders of SDXL. Raises InputError as `TextEncoder.load`."""
        model = load_model(Path(folder, "text_encoder_2"), variant, projection=True)
        second = TextEncoder(load_tokenizer(Path(folder, "tokenizer_2")), model.to(dtype=dtype) if dtype else model)
        first = TextEncoder.load(folder, variant=variant, dtype=dtype)
        return cls(first, second, zeros_for_empty=zeros_for_empty).eval()


class ClassLabels(PromptEncoder):
    """The classes of a network with `num_class_embeds`, by name; it holds no weights, the network embeds the numbers.

    names: class i is names[i]; the number after the last is the null class, which "" stands for. Raises InputError for
    names that are no texts, empty, or there twice.
    """

    max_length = 1

    def __init__(self, names: Sequence[str]):
        super().__init__()
        if isinstance(names, str) or not all(isinstance(name, str) and name for name in names) or not len(names):
            raise InputError(f"class_names are {shorten(str(names))}: a list with a text for each class is needed")
        self.names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(("", *self.names), -1)}
        self._numbers[""] = len(self.names)
        if len(self._numbers) <= len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise InputError(f"class_names: {shorten(twice)} is there twice; each class needs a name of its own")

    def tokenize(self, captions: Sequence[str], *, chunks: int = 1, refuse_long: bool = False) -> tuple[Tensor, int]:
        """Class numbers [B * chunks, 1] (int64), and 0. Raises InputError for a name that is none of the classes'."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        for name in captions:
            if name not in self._numbers:
                near = difflib.get_close_matches(name, self.names, 1, 0) or self.names
                raise InputError(f"{shorten(name)} is none of the {len(self.names)} classes; {shorten(near[0])} is")
        numbers = [self._numbers[name] for name in captions for _ in range(chunks)]
        return torch.tensor(numbers, dtype=torch.int64).reshape(-1, 1), 0

    def chunks(self, *prompts: str) -> int:
        self.tokenize(prompts)
        return 1

    def forward(self, ids: Tensor) -> Conditioning:
        """ids [B, 1] -> class_labels [B]."""
        return Conditioning(class_labels=ids[:, 0])

    def vocabulary(self) -> bytes:
        return json.dumps(self.names).encode()

    def save(self, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Writes nothing: the names are part of model_index.json."""
