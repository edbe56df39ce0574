"""Prompts to conditioning: what the network is told besides the noisy picture and the noise level.

Shapes: B batch, L context length, D context width, P width of the pooled text.

The text encoder is CLIP's text transformer (Radford et al. 2021, section 2.4) over byte-level BPE (Sennrich et al.
2016), as transformers' CLIPTextModel and CLIPTokenizer; both are imported only when an encoder is made or loaded.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from .clip import load_model, load_tokenizer, save_model, save_tokenizer, tokenizer_json
from .errors import InputError
from .untrusted import shorten

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_CHUNKS = 32  # of one prompt: 2,400 tokens of CLIP's
ALPHABET = 256  # bytes; each is a token once inside a word and once ending it


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a network is conditioned on, one row a picture; None where a network does not use it.

    context       [B, L, D]  hidden states of the text
    mask          [B, L]     bool, True where `context` is attended to; None attends everywhere
    pooled        [B, P]     one vector for the whole text (SDXL)
    time_ids      [B, 6]     sizes and crop (SDXL)
    class_labels  [B] or [B, n]  class numbers, or vectors
    extra         [B, c, H, W]   further input channels: a mask and what it leaves, or a picture to be changed
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    class_labels: Tensor | None = None
    extra: Tensor | None = None

    def _present(self) -> dict[str, Tensor]:
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }

    def given(self) -> set[str]:
        """The names of what is not None."""
        return {*self._present()}

    def __len__(self) -> int:
        """B; 0 when nothing is given."""
        return next((len(value) for value in self._present().values()), 0)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "Conditioning":
        """These rows, in this order, repeated where `rows` repeats them."""
        return Conditioning(**{name: value[rows] for name, value in self._present().items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """On `device`; `context`, `pooled` and `extra` in `dtype`. Tensors that are there are the same objects."""
        cast = {"context", "pooled", "extra"}
        return Conditioning(
            **{
                name: value.to(device=device, dtype=dtype if name in cast else None)
                for name, value in self._present().items()
            }
        )

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """All rows of `parts`, one after the other. Raises ValueError when they do not have the same fields."""
        present = [part._present() for part in parts]
        if len({frozenset(names) for names in present}) != 1:
            raise ValueError(
                f"conditionings of different fields cannot be joined: {[sorted(names) for names in present]}"
            )
        return Conditioning(**{name: torch.cat([values[name] for values in present]) for name in present[0]})

    def end_to_end(self, chunks: int) -> "Conditioning":
        """Each `chunks` rows as one: `context` and `mask` laid end to end, of all else what the first of them holds."""
        long = {"context", "mask"}  # [B * chunks, L, ...] -> [B, chunks * L, ...]
        return Conditioning(
            **{
                name: value.unflatten(0, (len(value) // chunks, chunks)).flatten(1, 2)
                if name in long
                else value[::chunks]
                for name, value in self._present().items()
            }
        )


def size_ids(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """[6] float32: what SDXL is told of a picture's size, a row of `Conditioning.time_ids`.

    (height, width) in pixels of the picture before it was resized, (top, left) of the crop in the resized picture,
    (height, width) of the crop (Podell et al. 2023, arXiv:2307.01952, section 2.2).
    """
    return torch.tensor([*original, *crop, *target], dtype=torch.float32)


class PromptEncoder(nn.Module, ABC):
    """What a model reads prompts with: words (TextEncoder, prompts.DualTextEncoder) or names
    of classes (prompts.ClassLabels).

    width: the D of its context, None where it gives none; pooled_width: the P of its pooled text, None likewise;
    max_length: tokens that are read at once, two of them its begin and end. A longer prompt can be read in chunks of
    max_length - 2 tokens, framed and encoded each by itself, as A1111 and ComfyUI do it; where a chunk ends, no heed is
    paid to words. `encode([""])` is the null condition, that which guidance leads away from.
    """

    width: int | None = None
    pooled_width: int | None = None
    max_length: int

    @property
    def encoders(self) -> "dict[str, TextEncoder]":
        """The text encoders within, by the sub-folder of a model's folder that holds their weights."""
        return {}

    @abstractmethod
    def tokenize(self, captions: Sequence[str], *, chunks: int = 1, refuse_long: bool = False) -> tuple[Tensor, int]:
        """ids [B * chunks, ...] (int64) of `captions`, for `forward`, and how many captions were cut to fit.

        A caption that needs fewer chunks is followed by those of the empty one. Raises InputError for a caption that
        does not fit, where `refuse_long`.
        """

    @abstractmethod
    def chunks(self, *prompts: str) -> int:
        """How many chunks the longest of `prompts` takes: of a prompt and its negative prompt, what both are read in.

        Raises InputError for over MAX_CHUNKS, or for what is no prompt of this encoder's.
        """

    def encode(self, prompts: Sequence[str], *, chunks: int = 1) -> Conditioning:
        """The conditioning of `prompts`, one row each, its context `chunks` * L long; pooled is the first chunk's.

        Raises InputError for a prompt that takes more chunks.
        """
        ids, _ = self.tokenize(prompts, chunks=chunks, refuse_long=True)
        conditioning: Conditioning = self(ids)
        return conditioning.end_to_end(chunks)

    @abstractmethod
    def vocabulary(self) -> bytes:
        """All that decides what a caption becomes, but for the weights."""

    def fingerprint(self) -> str:
        """sha256 (hex) of `vocabulary`; the weights are not part of it."""
        return hashlib.sha256(self.vocabulary()).hexdigest()

    @abstractmethod
    def save(self, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Writes its sub-folders in `folder`. Raises InputError for a weight that overflows in `dtype`; SaveError."""


class TextEncoder(PromptEncoder):
    """A tokenizer and the transformer that reads its tokens.

    tokenizer: transformers.CLIPTokenizer; model: transformers.CLIPTextModel. Raises InputError when they do not fit.
    """

    width: int

    def __init__(self, tokenizer: Any, model: nn.Module):
        super().__init__()
        self.tokenizer = tokenizer
        self.model = model
        config: Any = model.config
        tokens = 1 + max(tokenizer.get_vocab().values())
        if tokens > config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokens} tokens, the text encoder embeds {config.vocab_size}:"
                " take both from the same model"
            )
        self.max_length: int = min(tokenizer.model_max_length, config.max_position_embeddings)
        if self.max_length < 3:
            raise InputError(f"the text encoder reads {self.max_length} tokens: no word fits between begin and end")
        self.width = config.hidden_size

    @property
    def encoders(self) -> "dict[str, TextEncoder]":
        return {"text_encoder": self}

    def tokenize(self, captions: Sequence[str], *, chunks: int = 1, refuse_long: bool = False) -> tuple[Tensor, int]:
        """Token ids [B * chunks, L] (int64), padded to the L the encoder reads; otherwise as `PromptEncoder`."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        ids = torch.full((len(captions) * chunks, self.max_length), self.tokenizer.pad_token_id, dtype=torch.int64)
        size, cut = self.max_length - 2, 0
        for i, (begin, *words, end) in enumerate(self._rows(captions)):
            if len(words) > chunks * size:
                if refuse_long:
                    raise InputError(
                        f"the prompt {shorten(captions[i])} takes {len(words) + 2} tokens, the text encoder reads"
                        f" {chunks * size + 2}: shorten it"
                    )
                cut += 1
            for k in range(chunks):
                chunk = [begin, *words[k * size : (k + 1) * size], end]
                ids[i * chunks + k, : len(chunk)] = torch.tensor(chunk)
        return ids, cut

    def chunks(self, *prompts: str) -> int:
        size, most = self.max_length - 2, 1
        for prompt, row in zip(prompts, self._rows(prompts), strict=True):
            if len(row) - 2 > MAX_CHUNKS * size:
                raise InputError(
                    f"the prompt {shorten(prompt)} takes {len(row)} tokens: at most {MAX_CHUNKS * size + 2} are read,"
                    f" in {MAX_CHUNKS} chunks; shorten it"
                )
            most = max(most, math.ceil((len(row) - 2) / size))
        return most

    def _rows(self, captions: Sequence[str]) -> list[list[int]]:
        """All tokens of each, between one that begins and one that ends it."""
        texts = [caption.encode("utf-8", "replace").decode() for caption in captions]  # a lone surrogate has no bytes
        return self.tokenizer(texts, verbose=False)["input_ids"] if texts else []

    def forward(self, ids: Tensor) -> Conditioning:
        """ids [B, L] -> the last hidden state [B, L, D] as context.

        No mask: padding is attended to, as in Stable Diffusion's pipelines, so that those give the same pictures.
        """
        device = next(self.model.parameters()).device
        return Conditioning(context=self.model(ids.to(device)).last_hidden_state)

    def vocabulary(self) -> bytes:
        return tokenizer_json(self.tokenizer).encode()

    def save(self, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Writes `text_encoder/` and `tokenizer/` in `folder`, each for the stock class of its name.

        Raises InputError for a weight that does not fit in `dtype`; SaveError.
        """
        self.save_as(Path(folder), "", variant, dtype)

    def save_as(self, folder: Path, end: str, variant: str | None, dtype: torch.dtype | None) -> None:
        """`save`, with `end` behind the names of the sub-folders."""
        save_model(self.model, folder / f"text_encoder{end}", variant=variant, dtype=dtype)
        save_tokenizer(self.tokenizer, folder / f"tokenizer{end}")

    @classmethod
    def load(cls, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Reads what `save` writes, and the `text_encoder/` and `tokenizer/` of Stable Diffusion 1.x and 2.x.

        Raises InputError when a file is missing, damaged, or of another architecture.
        """
        tokenizer = load_tokenizer(Path(folder, "tokenizer"))
        model = load_model(Path(folder, "text_encoder"), variant)
        return cls(tokenizer, model.to(dtype=dtype) if dtype else model).eval()


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """Byte-level BPE in CLIP's form: 256 bytes, 256 bytes that end a word, merges, start and end of text last.

    vocab_size: the most tokens there may be, at least 514; max_length: tokens of a caption, start and end included.
    The result depends on how often each word occurs, not on the order of the captions. Every string can be encoded.

    Returns a transformers.CLIPTokenizer. Raises InputError for sizes that cannot be.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    least = 2 * ALPHABET + 2
    if vocab_size < least:
        raise InputError(f"a vocabulary of {vocab_size} tokens cannot hold every byte: ask for {least} or more")
    if max_length < 3:
        raise InputError(f"captions of {max_length} tokens hold no word between start and end: ask for 3 or more")
    # The letters stand for bytes, in CLIP's order.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in letters]
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    stock = CLIPTokenizer().backend_tokenizer
    bpe.normalizer = stock.normalizer
    bpe.pre_tokenizer = stock.pre_tokenizer
    # Endings named beforehand have fixed numbers; found on the way they would be numbered in the order of a hash map,
    # and the numbers decide between pairs that are equally frequent.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=letters,
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator((caption.encode("utf-8", "replace").decode() for caption in captions), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*letters, *endings, *(left + right for left, right in merges), START, END])
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def new_text_encoder(
    tokenizer: Any, *, hidden_size: int, num_hidden_layers: int, num_attention_heads: int, seed: int = 0
) -> TextEncoder:
    """A CLIP text transformer for `tokenizer`, with weights drawn from `seed` as CLIP draws them.

    hidden_size: the D of its context; the feed-forward layers are four times as wide.
    Raises InputError for sizes that cannot be.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    if min(hidden_size, num_hidden_layers, num_attention_heads) < 1 or hidden_size % num_attention_heads:
        raise InputError(
            f"a text encoder of hidden_size {hidden_size}, {num_hidden_layers} layers and {num_attention_heads} heads"
            " cannot be: hidden_size is a multiple of num_attention_heads, all are 1 or more"
        )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextEncoder(tokenizer, CLIPTextModel(config))
