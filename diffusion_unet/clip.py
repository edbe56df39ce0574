"""CLIP's text transformers and tokenizers as files: what the stock classes of these names write and read.

transformers is imported only when a model is read.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import cast, load_state, read_weights, write_bytes, write_json, write_safetensors
from .errors import InputError
from .untrusted import Field, checked, read_bytes, read_json, shorten

PREFIX = "text_model."  # of the keys in every published CLIP text encoder; newer transformers drop it in memory
PROJECTION = "text_projection."  # of those outside
MAX_TOKENIZER_BYTES = 32 << 20

_MAX_TOKENS = 100_000  # CLIP has 49,408, and transformers takes tokenizers of more for another kind
_SIZE = Field(int, 1, 1 << 20)
_NUMBER = Field(int, 0, 1 << 20)

# The fields of a CLIP text config that decide its numbers.
TEXT_FIELDS = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "projection_dim": _SIZE,
    "num_hidden_layers": Field(int, 1, 256),
    "num_attention_heads": _SIZE,
    "max_position_embeddings": _SIZE,
    "hidden_act": Field(str),
    "layer_norm_eps": Field(float, 0, 1),
    "attention_dropout": Field(float, 0, 1),
    "pad_token_id": _NUMBER,
    "bos_token_id": _NUMBER,
    "eos_token_id": _NUMBER,
}
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
TOKENIZER_FIELDS = {"model_max_length": Field((int, float), 3), "tokenizer_class": Field(str)}
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer as JSON, without how the last texts were cut and filled up, which transformers keeps in it."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    text: str = plain.to_str()
    return text


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    whole = tokenizer_json(tokenizer)
    model = json.loads(whole)["model"]
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
        "tokenizer.json": whole,
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
    return {name: text.encode() for name, text in texts.items()}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes `tokenizer.json`, and `vocab.json` and `merges.txt` for older transformers and other programs."""
    for name, data in _tokenizer_files(tokenizer).items():
        write_bytes(folder / name, data)


def load_tokenizer(folder: Path) -> Any:
    """The transformers.CLIPTokenizer in a folder, made of its vocabulary and its special tokens alone.

    What else its files hold, such as other rules to split a text, names of classes and templates, is never used.
    Raises InputError."""
    from transformers import CLIPTokenizer

    settings = read_json(folder / "tokenizer_config.json")
    checked(settings, TOKENIZER_FIELDS, folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") not in {"CLIPTokenizer", "CLIPTokenizerFast"}:
        raise InputError(f"{folder} holds a {shorten(str(settings.get('tokenizer_class')))}: a CLIPTokenizer is needed")
    try:
        vocab, merges, added = _vocabulary(folder)
        named = settings
        if (own := settings.get("added_tokens_decoder")) is not None:
            added = {int(number): token for number, token in own.items()}
        elif (folder / "special_tokens_map.json").exists():
            named = settings | read_json(folder / "special_tokens_map.json")
        given = {number: _token(token) for number, token in added.items()}
        by_text = {str(token): token for token in given.values()}
        tokens = {name: _token(named[name]) for name in TOKENS if named.get(name) is not None}
        tokenizer = CLIPTokenizer(
            vocab=vocab,
            merges=merges,
            added_tokens_decoder=given,
            model_max_length=settings.get("model_max_length"),
            **{name: by_text.get(str(token), token) for name, token in tokens.items()},
        )
        tokenizer(["a"])
    except (KeyboardInterrupt, SystemExit, InputError):
        raise
    except BaseException as error:  # whatever its parsers raise, the file is what is wrong; a panic is no Exception
        raise InputError(f"{folder} cannot be read as a CLIP tokenizer: {shorten(str(error), 120)}") from error
    return tokenizer


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, Any]]:
    """Numbers of tokens, merges, and tokens beside these. Raises InputError, ValueError, what wrong types raise."""
    path = folder / "tokenizer.json"
    added: dict[int, Any] = {}
    if path.exists():
        whole = read_json(path, MAX_TOKENIZER_BYTES)
        model = whole.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise ValueError("its model is no BPE")
        vocab, rows = model["vocab"], model["merges"]
        added = {token["id"]: token for token in whole.get("added_tokens") or []}
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        path = folder / "vocab.json"
        vocab = read_json(path, MAX_TOKENIZER_BYTES)
        lines = read_bytes(folder / "merges.txt", MAX_TOKENIZER_BYTES).decode().split("\n")
        rows = [line.removesuffix("\r") for line in lines if line.strip() and not line.startswith("#version")]
        legacy = folder / "added_tokens.json"
        words = read_json(legacy, MAX_TOKENIZER_BYTES) if legacy.exists() else {}
        added = {number: {"content": word, "normalized": True} for word, number in words.items()}
    else:
        raise InputError(f"{folder} holds no tokenizer: tokenizer.json, or vocab.json and merges.txt, are needed")
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise ValueError("its vocabulary does not give each token a number")
    numbers = {*vocab.values()}
    if not vocab or len(numbers) < len(vocab) or min(numbers) < 0 or max(numbers) >= _MAX_TOKENS:
        raise ValueError(f"its tokens are not numbered once each, below {_MAX_TOKENS}")
    merges = [tuple(row.split(" ") if isinstance(row, str) else row) for row in rows]
    if not all(len(merge) == 2 and all(isinstance(part, str) for part in merge) for merge in merges):
        raise ValueError("its merges are not pairs")
    return vocab, merges, added


def _token(value: Any) -> Any:
    """An AddedToken, or the text of one. Raises ValueError."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{shorten(str(value))} is no token")
    flags = {name: value[name] for name in _TOKEN_FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{shorten(str(value))} is no token")
    return AddedToken(value["content"], **flags)


def save_model(model: nn.Module, folder: Path, *, variant: str | None, dtype: torch.dtype | None) -> None:
    """Writes `config.json` and `model[.variant].safetensors` with the keys of the published checkpoints.

    Raises InputError for a weight that does not fit in `dtype`; SaveError.
    """
    weights = cast(model.state_dict(), dtype, "the text encoder")
    tensors = {_published(key): value for key, value in weights.items()}
    config: Any = model.config
    settings = {name: getattr(config, name) for name in TEXT_FIELDS}
    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    kind = "CLIPTextModelWithProjection" if hasattr(model, "text_projection") else "CLIPTextModel"
    settings |= {"architectures": [kind], "model_type": "clip_text_model", "dtype": stored}
    name = f"model.{variant}.safetensors" if variant else "model.safetensors"
    write_safetensors(folder / name, tensors, {"format": "pt"})
    write_json(folder / "config.json", settings)


def load_model(folder: Path, variant: str | None, *, projection: bool = False) -> nn.Module:
    """A CLIPTextModel, or a CLIPTextModelWithProjection, of the files' dtype. Raises InputError."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    config = CLIPTextConfig(**text_settings(folder / "config.json", kind.__name__))
    tensors, path = read_weights(folder, "model", variant)
    found = {_published(key): value for key, value in tensors.items()}
    found.pop(PREFIX + "embeddings.position_ids", None)  # files of 2022 hold this constant
    with torch.device("meta"):
        model: nn.Module = kind(config)
    own = {_published(key): key for key in model.state_dict()}
    load_state(model, {own.get(key, key): value for key, value in found.items()}, path)
    inner: Any = getattr(model, PREFIX.rstrip("."), model)
    inner.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    return model


def _published(key: str) -> str:
    return key if key.startswith((PREFIX, PROJECTION)) else PREFIX + key


def text_settings(path: Path, wanted: str) -> dict[str, Any]:
    """The fields of a CLIP text config that are known here, their types and sizes checked; the others are left out.

    wanted: the class whose config it must be. Raises InputError."""
    raw = read_json(path)
    kind = raw.get("architectures") or [wanted]
    if raw.get("model_type") not in (None, "clip_text_model") or kind != [wanted]:
        raise InputError(f"{path} describes {shorten(str(kind))}: a {wanted} is needed")
    settings = checked(raw, TEXT_FIELDS, path)
    if settings.get("hidden_act", "quick_gelu") not in {"quick_gelu", "gelu"}:
        raise InputError(f"{path}: hidden_act is {shorten(settings['hidden_act'])}: quick_gelu or gelu is needed")
    if settings.get("hidden_size", 512) % settings.get("num_attention_heads", 8):
        raise InputError(f"{path}: hidden_size is no multiple of num_attention_heads")
    return settings
