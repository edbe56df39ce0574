"""Text to conditioning: what the network is told besides the noisy picture and the noise level.

Shapes: B batch, L context length, D context width, P width of the pooled text.

The text encoder is CLIP's text transformer (Radford et al. 2021, section 2.4) over byte-level BPE (Sennrich et al.
2016), as transformers' CLIPTextModel and CLIPTokenizer; both are imported only when an encoder is made or loaded.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from .checkpoint import cast, load_state, read_json, read_weights, write_bytes, write_json, write_safetensors
from .errors import InputError

START, END = "<|startoftext|>", "<|endoftext|>"
ALPHABET = 256  # bytes; each is a token once inside a word and once ending it
PREFIX = "text_model."  # of the keys in every published CLIP text encoder; newer transformers drop it in memory
MAX_TOKENIZER_BYTES = 32 << 20

# The fields of a CLIP text config that decide its numbers, with the type each must have.
_CONFIG_FIELDS: dict[str, tuple[type, ...]] = {
    "vocab_size": (int,),
    "hidden_size": (int,),
    "intermediate_size": (int,),
    "projection_dim": (int,),
    "num_hidden_layers": (int,),
    "num_attention_heads": (int,),
    "max_position_embeddings": (int,),
    "hidden_act": (str,),
    "layer_norm_eps": (int, float),
    "attention_dropout": (int, float),
    "pad_token_id": (int,),
    "bos_token_id": (int,),
    "eos_token_id": (int,),
}
_SIZES = [name for name in _CONFIG_FIELDS if name.startswith(("vocab", "hidden_size", "inter", "proj", "num", "max"))]
_MAX_SIZE = 1 << 20
_MAX_LAYERS = 256


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a network is conditioned on, one row a picture; None where a network does not use it.

    context       [B, L, D]  hidden states of the text
    mask          [B, L]     bool, True where `context` is attended to; None attends everywhere
    pooled        [B, P]     one vector for the whole text (SDXL)
    time_ids      [B, 6]     sizes and crop (SDXL)
    class_labels  [B] or [B, n]  class numbers, or vectors
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    class_labels: Tensor | None = None

    def _present(self) -> dict[str, Tensor]:
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }

    def __len__(self) -> int:
        """B; 0 when nothing is given."""
        return next((len(value) for value in self._present().values()), 0)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "Conditioning":
        """These rows, in this order, repeated where `rows` repeats them."""
        return Conditioning(**{name: value[rows] for name, value in self._present().items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """On `device`; `context` and `pooled` in `dtype`. Tensors that are there already are the same objects."""
        cast = {"context", "pooled"}
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


class TextEncoder(nn.Module):
    """A tokenizer and the transformer that reads its tokens.

    tokenizer: transformers.CLIPTokenizer; model: transformers.CLIPTextModel. Raises InputError when they do not fit.
    """

    def __init__(self, tokenizer: Any, model: nn.Module):
        super().__init__()
        self.tokenizer = tokenizer
        self.model = model
        config: Any = model.config
        if len(tokenizer) > config.vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder embeds {config.vocab_size}:"
                " take both from the same model"
            )
        self.max_length: int = min(tokenizer.model_max_length, config.max_position_embeddings)
        self.width: int = config.hidden_size

    def tokenize(self, captions: Sequence[str], *, refuse_long: bool = False) -> tuple[Tensor, int]:
        """Token ids [B, L] (int64), padded to the L the encoder reads, and how many captions were cut to fit.

        Raises InputError for a caption that does not fit, where `refuse_long`.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        texts = [caption.encode("utf-8", "replace").decode() for caption in captions]  # a lone surrogate has no bytes
        rows = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        ids = torch.full((len(rows), self.max_length), self.tokenizer.pad_token_id, dtype=torch.int64)
        cut = 0
        for i, row in enumerate(rows):
            if len(row) > self.max_length:
                if refuse_long:
                    raise InputError(
                        f"the prompt {_shorten(captions[i])} takes {len(row)} tokens, the text encoder reads"
                        f" {self.max_length}: shorten it"
                    )
                cut += 1
                row = [*row[: self.max_length - 1], row[-1]]
            ids[i, : len(row)] = torch.tensor(row)
        return ids, cut

    def forward(self, ids: Tensor) -> Conditioning:
        """ids [B, L] -> the last hidden state [B, L, D] as context.

        No mask: padding is attended to, as in Stable Diffusion's pipelines, so that those give the same pictures.
        """
        device = next(self.model.parameters()).device
        return Conditioning(context=self.model(ids.to(device)).last_hidden_state)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of `prompts`, one row each; `encode([""])` is the null condition of guidance.

        Raises InputError for a prompt that is longer than the encoder reads.
        """
        ids, _ = self.tokenize(prompts, refuse_long=True)
        conditioning: Conditioning = self(ids)
        return conditioning

    def save(self, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Writes `text_encoder/` and `tokenizer/` in `folder`, each for the stock class of its name.

        The keys are those of the published checkpoints, and the vocabulary is written as `vocab.json` and `merges.txt`
        besides `tokenizer.json`, so that transformers of every age, and other programs, read them.

        Raises InputError for a weight that does not fit in `dtype`; SaveError.
        """
        folder = Path(folder)
        weights = cast(self.model.state_dict(), dtype, "the text encoder")
        tensors = {PREFIX + key.removeprefix(PREFIX): value for key, value in weights.items()}
        config: Any = self.model.config
        settings = {name: getattr(config, name) for name in _CONFIG_FIELDS}
        stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        settings |= {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": stored}
        name = f"model.{variant}.safetensors" if variant else "model.safetensors"
        write_safetensors(folder / "text_encoder" / name, tensors, {"format": "pt"})
        write_json(folder / "text_encoder" / "config.json", settings)
        for path, data in _tokenizer_files(self.tokenizer).items():
            write_bytes(folder / "tokenizer" / path, data)

    @classmethod
    def load(cls, folder: Path | str, *, variant: str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Reads what `save` writes, and the `text_encoder/` and `tokenizer/` of Stable Diffusion 1.x and 2.x.

        Raises InputError when a file is missing, damaged, or of another architecture.
        """
        folder = Path(folder)
        tokenizer = _load_tokenizer(folder / "tokenizer")
        model = _load_model(folder / "text_encoder", variant)
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


def _shorten(text: str, limit: int = 60) -> str:
    return ascii(text) if len(text) <= limit else ascii(text[:limit]) + "..."


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.model_max_length,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
    }
    texts = {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(),
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
    return {name: text.encode() for name, text in texts.items()}


def _load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    files = [path for path in folder.glob("*") if path.is_file()]
    names = {path.name for path in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise InputError(f"{folder} holds no tokenizer: tokenizer.json, or vocab.json and merges.txt, are needed")
    for path in files:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise InputError(f"{path} is larger than {MAX_TOKENIZER_BYTES >> 20} MB: no CLIP tokenizer is")
    settings = read_json(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") not in {"CLIPTokenizer", "CLIPTokenizerFast"}:
        raise InputError(f"{folder} holds a {settings.get('tokenizer_class')!a}: a CLIPTokenizer is needed")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer(["a"])
    except Exception as error:  # whatever its parsers raise, the file is what is wrong
        raise InputError(f"{folder} cannot be read as a CLIP tokenizer: {_shorten(str(error), 120)}") from error
    return tokenizer


def _load_model(folder: Path, variant: str | None) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**_text_settings(folder / "config.json"))
    tensors, path = read_weights(folder, "model", variant)
    found = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    found.pop("embeddings.position_ids", None)  # files of 2022 hold this constant
    with torch.device("meta"):
        model = CLIPTextModel(config)
    inner = getattr(model, PREFIX.rstrip("."), model)
    load_state(inner, found, path)
    inner.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    return model


def _text_settings(path: Path) -> dict[str, Any]:
    """The fields of a CLIP text config that are known here, their types and sizes checked; the others are left out."""
    raw = read_json(path)
    kind = raw.get("architectures") or ["CLIPTextModel"]
    if raw.get("model_type") not in {None, "clip_text_model"} or kind != ["CLIPTextModel"]:
        raise InputError(f"{path} describes {_shorten(str(kind))}: a CLIPTextModel is needed")
    settings = {name: raw[name] for name in _CONFIG_FIELDS if raw.get(name) is not None}
    for name, value in settings.items():
        limit = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
        if type(value) not in _CONFIG_FIELDS[name]:
            raise InputError(f"{path}: {name} is {_shorten(str(value))}, of the wrong type")
        if name != "hidden_act" and not (1 if name in _SIZES else 0) <= value <= limit:
            raise InputError(f"{path}: {name} is {value!s:.60}: up to {limit} can be worked with")
        if float in _CONFIG_FIELDS[name]:
            settings[name] = float(value)
    if settings.get("hidden_act", "quick_gelu") not in {"quick_gelu", "gelu"}:
        raise InputError(f"{path}: hidden_act is {_shorten(settings['hidden_act'])}: quick_gelu or gelu is needed")
    if settings.get("hidden_size", 512) % settings.get("num_attention_heads", 8):
        raise InputError(f"{path}: hidden_size is no multiple of num_attention_heads")
    return settings
