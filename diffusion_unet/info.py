"""What a file or folder is, from its headers: no weights are read, nothing is unpickled, nothing in it is run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError

MAX_DEPTH = 256  # layers of one level
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
MAX_TEXT_BYTES = 1 << 20


def describe(path: Path) -> dict[str, Any]:
    """Facts about a model folder or a part of one, a training run or checkpoint, weights, a config, a picture.

    The first entry is always `kind`. Raises InputError for what is missing, damaged or none of these."""
    try:
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder")
        return _describe(path)
    except OSError as error:
        raise InputError(f"{str(path)[:200]}: cannot be read ({error.strerror or error})") from None


def _describe(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _folder(path)
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise InputError(f"{path}: a pickle, which is never read here: convert it to safetensors with what made it")
    readers = {".safetensors": _weights, ".png": _picture, ".json": _config, ".yaml": _config, ".yml": _config}
    if suffix not in readers:
        raise InputError(f"{path}: not a folder, and not one of {', '.join(readers)}")
    return readers[suffix](path)


def _folder(path: Path) -> dict[str, Any]:
    if (path / "model_index.json").is_file():
        return _model(path)
    if (path / "config.json").is_file():
        return {"kind": "part of a model", **_part(path)}
    if (path / "manifest.json").is_file():
        return {"kind": "checkpoint of a training run", **_checkpoint(path)}
    steps = {int(match[1]): file for file in path.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", file.name))}
    if steps:
        facts = {"kind": "training run", "checkpoints": ", ".join(map(str, sorted(steps)))}
        return {**facts, **_checkpoint(steps[max(steps)])}
    for name in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors"):
        if (path / name).is_file():
            return _weights(path / name)
    raise InputError(f"{path}: no model folder (model_index.json), part of one (config.json), run or checkpoint")


def _model(path: Path) -> dict[str, Any]:
    from .checkpoint import read_json

    facts: dict[str, Any] = {"kind": "model folder", "class": read_json(path / "model_index.json").get("_class_name")}
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        if (path / name).is_dir():
            facts[name] = ", ".join(f"{key} {value}" for key, value in _part(path / name).items())
    shown = {
        "unet/config.json": ("sample_size", "in_channels", "cross_attention_dim"),
        "scheduler/scheduler_config.json": ("_class_name", "prediction_type", "num_train_timesteps"),
        "tokenizer/tokenizer_config.json": ("model_max_length",),
    }
    for name, keys in shown.items():
        if (path / name).is_file():
            values = read_json(path / name)
            facts |= {f"{name.partition('/')[0]}.{key.strip('_')}": values.get(key) for key in keys}
    return facts


def _part(path: Path) -> dict[str, Any]:
    """One sub-folder of a model: config.json, and weights in one file or several, of one variant or several."""
    from .checkpoint import read_json

    variants: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.safetensors")):
        variants.setdefault(re.sub(r"-\d+-of-\d+", "", file.name), []).append(file)
    if not variants:
        raise InputError(f"{path}: no .safetensors file beside config.json")
    config = read_json(path / "config.json")
    names = config.get("architectures")
    facts: dict[str, Any] = {"class": config.get("_class_name") or (names[0] if isinstance(names, list) else None)}
    if len(variants) > 1:
        facts["variants"] = ", ".join(sorted(variants))
    return {**facts, **_summary(_headers(variants[min(variants, key=len)]))}


def _checkpoint(path: Path) -> dict[str, Any]:
    from .checkpoint import read_json

    state = read_json(path / "state.json")
    averages = sorted(file.stem.removeprefix("ema_") for file in path.glob("ema_*.safetensors"))
    weights = _summary(_headers([path / "model.safetensors"]))
    return {"step": state.get("step"), "averages": ", ".join(averages) or "none", **weights}


class _Headers(NamedTuple):
    shapes: dict[str, tuple[int, ...]]
    dtypes: set[str]
    metadata: dict[str, str]


def _headers(files: Sequence[Path]) -> _Headers:
    from safetensors import SafetensorError, safe_open

    headers = _Headers({}, set(), {})
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    tensor = file.get_slice(key)
                    headers.shapes[key] = tuple(tensor.get_shape())
                    headers.dtypes.add(tensor.get_dtype())
                headers.metadata.update(file.metadata() or {})
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: damaged, or no safetensors file ({error}); copy or download it again") from None
    return headers


def _summary(headers: _Headers) -> dict[str, Any]:
    parameters = 0
    for shape in headers.shapes.values():
        count = 1
        for size in shape:
            count *= size
        parameters += count
    return {"parameters": f"{parameters:,}", "tensors": len(headers.shapes), "dtype": ", ".join(sorted(headers.dtypes))}


def _weights(path: Path) -> dict[str, Any]:
    headers = _headers([path])
    kind, shapes = "weights", headers.shapes
    facts: dict[str, Any] = {}
    if "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes):
        kind = "weights of a U-Net"
        contexts = {shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")}
        facts = {"in_channels": shapes["conv_in.weight"][1], "cross_attention_dim": min(contexts, default=None)}
    elif any(key.startswith("model.diffusion_model.") for key in shapes):
        kind = "a model in the original single-file layout"
    elif any(part in key for key in shapes for part in (".lora_A.", ".lora_down.", "lora_linear_layer")):
        kind = "a LoRA or DoRA"
    elif "placeholder_token" in headers.metadata:
        kind = "a word of textual inversion"
    elif any(key.startswith("unet.") for key in shapes):
        kind = "weights of a run: U-Net, and the text encoder where it is trained"
    elif any(key.endswith("embeddings.token_embedding.weight") for key in shapes):
        kind = "weights of a text encoder"
    metadata = {f"metadata.{key}": value for key, value in sorted(headers.metadata.items())}
    return {"kind": kind, **_summary(headers), **facts, **metadata}


def _config(path: Path) -> dict[str, Any]:
    tree = _read_tree(path)
    model = tree.get("model")
    if isinstance(model, dict):
        unet = model.get("unet")
        facts = {"kind": "training config", "sections": ", ".join(map(str, tree))}
        return {**facts, **(_count(unet) if isinstance(unet, dict) else {"pretrained": model.get("pretrained")})}
    if "block_out_channels" in tree:
        # Files in circulation carry the keys of an EMA, too.
        return {"kind": "U-Net config", **_count(tree, ignore_unknown=path.suffix.lower() == ".json")}
    raise InputError(f"{path}: neither a U-Net config (block_out_channels) nor a training config (model)")


def _read_tree(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() == ".json":
        from .checkpoint import read_json

        return read_json(path)
    from .plain_yaml import parse

    if path.stat().st_size > MAX_TEXT_BYTES:
        raise InputError(f"{path}: over {MAX_TEXT_BYTES} bytes, too large for a configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read as a UTF-8 text file") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds a {type(tree).__name__}, where sections were expected")
    return tree


def _count(values: Mapping[str, Any], *, ignore_unknown: bool = False) -> dict[str, Any]:
    """Builds the U-Net without memory for its weights. Raises InputError where the config is not supported."""
    import torch

    from .config import UNUSED, UNetConfig
    from .unet import UNet

    for key, value in values.items():
        if "layers_per_block" in str(key) and _largest(value) > MAX_DEPTH:
            raise InputError(f"{key}: over {MAX_DEPTH} layers cannot be worked with")
    config = UNetConfig.from_diffusers(values, ignore_unknown=ignore_unknown)
    try:
        with torch.device("meta"):
            unet = UNet(config)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:  # sizes beyond what a tensor can have
        line = " ".join(str(error).split())[:120]
        raise InputError(f"a U-Net of these sizes cannot be: {line}") from None
    shown = ("sample_size", "in_channels", "out_channels", "block_out_channels", "cross_attention_dim")
    facts = config.to_diffusers()
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    known = {*facts, *UNUSED, "num_attention_heads"}
    ignored = ", ".join(key for key in values if key not in known and not key.startswith("_"))
    described = {"parameters": f"{parameters:,}", **{key: facts.get(key) for key in shown}}
    return described | ({"ignored keys": ignored} if ignored else {})


def _largest(value: Any) -> float:
    """The largest number in nested lists."""
    if isinstance(value, list | tuple):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int | float) else 0


def _picture(path: Path) -> dict[str, Any]:
    import json
    import warnings

    from PIL import Image, UnidentifiedImageError

    from .images import RECORD

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("PNG",)) as image:
            facts = {"kind": "picture", "size": f"{image.width}x{image.height}", "mode": image.mode}
            texts = image.info
        record = json.loads(texts[RECORD]) if isinstance(texts.get(RECORD), str) else None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: has too many pixels for a picture") from None
    except (UnidentifiedImageError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or no PNG file: {error}") from None
    if isinstance(record, dict):
        return {**facts, **{f"record.{key}": value for key, value in record.items()}}
    return {**facts, "record": "none: not drawn by diffusion-unet, or written anew since"}
