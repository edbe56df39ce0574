"""CLIP's text transformers and tokenizers as files: what the stock classes of these names write and read.

transformers is imported only when a model is read.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import cast, load_state, read_json, read_weights, write_bytes, write_json, write_safetensors
from .errors import InputError

PREFIX = "text_model."  # of the keys in every published CLIP text encoder; newer transformers drop it in memory
PROJECTION = "text_projection."  # of those outside
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


def shorten(text: str, limit: int = 60) -> str:
    """At most `limit` characters of a text from outside, in ASCII and quotes, fit for a message of one line."""
    return ascii(text) if len(text) <= limit else ascii(text[:limit]) + "..."


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
    """The transformers.CLIPTokenizer in a folder. Raises InputError."""
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
        raise InputError(f"{folder} cannot be read as a CLIP tokenizer: {shorten(str(error), 120)}") from error
    return tokenizer


def save_model(model: nn.Module, folder: Path, *, variant: str | None, dtype: torch.dtype | None) -> None:
    """Writes `config.json` and `model[.variant].safetensors` with the keys of the published checkpoints.

    Raises InputError for a weight that does not fit in `dtype`; SaveError.
    """
    weights = cast(model.state_dict(), dtype, "the text encoder")
    tensors = {_published(key): value for key, value in weights.items()}
    config: Any = model.config
    settings = {name: getattr(config, name) for name in _CONFIG_FIELDS}
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
    if raw.get("model_type") not in {None, "clip_text_model"} or kind != [wanted]:
        raise InputError(f"{path} describes {shorten(str(kind))}: a {wanted} is needed")
    settings = {name: raw[name] for name in _CONFIG_FIELDS if raw.get(name) is not None}
    for name, value in settings.items():
        limit = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
        if type(value) not in _CONFIG_FIELDS[name]:
            raise InputError(f"{path}: {name} is {shorten(str(value))}, of the wrong type")
        if name != "hidden_act" and not (1 if name in _SIZES else 0) <= value <= limit:
            raise InputError(f"{path}: {name} is {value!s:.60}: up to {limit} can be worked with")
        if float in _CONFIG_FIELDS[name]:
            settings[name] = float(value)
    if settings.get("hidden_act", "quick_gelu") not in {"quick_gelu", "gelu"}:
        raise InputError(f"{path}: hidden_act is {shorten(settings['hidden_act'])}: quick_gelu or gelu is needed")
    if settings.get("hidden_size", 512) % settings.get("num_attention_heads", 8):
        raise InputError(f"{path}: hidden_size is no multiple of num_attention_heads")
    return settings
