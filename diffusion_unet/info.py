"""What a file or folder is, from its headers: no weights are read, nothing is unpickled, nothing in it is run."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, in_bytes
from .untrusted import Header, parse_object, read_header, read_json

PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
MAX_TEXT_BYTES = 1 << 17  # of YAML, whose reader takes seconds for a megabyte
MAX_STATE_BYTES = 64 << 20
MAX_NODES = 1 << 18  # of a YAML file, whose parts may be in it many times over


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
    index = read_json(path / "model_index.json")
    facts: dict[str, Any] = {"kind": "model folder", "class": index.get("_class_name")}
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
    known = _known()
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        values = read_json(path / name) if (path / name).is_file() else {}
        if ignored := _ignored(values, known[Path(name).name]):
            facts[f"{Path(name).stem}.ignored keys"] = ignored
    return facts


def _known() -> dict[str, set[str]]:
    """The keys that are read of a config, by its class, or by its file where that tells."""
    from . import clip, codec, config, model_index, schedule

    text = {*clip.TEXT_FIELDS, "architectures", "model_type"}
    return {
        "UNet2DConditionModel": {*config.UNetConfig().to_diffusers(), *config.UNUSED, "num_attention_heads"},
        "AutoencoderKL": {*codec.VAE_FIELDS},
        "CLIPTextModel": text,
        "CLIPTextModelWithProjection": text,
        "scheduler_config.json": {*schedule.FIELDS, "prediction_type", "beta_schedule", "clip_sample"},
        "tokenizer_config.json": {*clip.TOKENIZER_FIELDS, *clip.TOKENS, "added_tokens_decoder"},
        "model_index.json": {*model_index.PARTS, *model_index.SETTINGS},
    }


def _ignored(values: Mapping[str, Any], known: set[str]) -> str:
    """Keys of a config that are not read; those of its writer's own, which begin with "_", are not listed."""
    return ", ".join(str(key) for key in values if key not in known and not str(key).startswith("_"))


def _part(path: Path) -> dict[str, Any]:
    """One sub-folder of a model: config.json, and weights in one file or several, of one variant or several."""
    variants: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.safetensors")):
        variants.setdefault(re.sub(r"-\d+-of-\d+", "", file.name), []).append(file)
    if not variants:
        raise InputError(f"{path}: no .safetensors file beside config.json")
    config = read_json(path / "config.json")
    names = config.get("architectures")
    kind = config.get("_class_name") or (names[0] if isinstance(names, list) and names else None)
    facts: dict[str, Any] = {"class": kind}
    if len(variants) > 1:
        facts["variants"] = ", ".join(sorted(variants))
    facts |= _summary(_headers(variants[min(variants, key=len)]))
    ignored = _ignored(config, _known().get(str(kind), {*config}))
    return facts | ({"ignored keys": ignored} if ignored else {})


def _checkpoint(path: Path) -> dict[str, Any]:
    state = read_json(path / "state.json", MAX_STATE_BYTES)
    averages = sorted(file.stem.removeprefix("ema_") for file in path.glob("ema_*.safetensors"))
    weights = _summary(_headers([path / "model.safetensors"]))
    return {"step": state.get("step"), "averages": ", ".join(averages) or "none", **weights}


def _headers(files: Sequence[Path]) -> Header:
    """The headers of several files as if they were one's."""
    whole = Header({}, {})
    for header in map(read_header, files):
        whole.tensors.update(header.tensors)
        whole.metadata.update(header.metadata)
    return whole


def _summary(header: Header) -> dict[str, Any]:
    parameters = sum(math.prod(entry.shape) for entry in header.tensors.values())
    dtypes = sorted({entry.dtype for entry in header.tensors.values()})
    return {"parameters": f"{parameters:,}", "tensors": len(header.tensors), "dtype": ", ".join(dtypes)}


def _weights(path: Path) -> dict[str, Any]:
    header = read_header(path)
    kind, shapes = "weights", {key: entry.shape for key, entry in header.tensors.items()}
    facts: dict[str, Any] = {}
    if "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes):
        kind = "weights of a U-Net"
        contexts = {shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and shape}
        channels = shapes["conv_in.weight"][1:2]  # [C, in, k, k], or what a stranger took for it
        facts = {"in_channels": min(channels, default=None), "cross_attention_dim": min(contexts, default=None)}
    elif any(key.startswith("model.diffusion_model.") for key in shapes):
        kind = "a model in the original single-file layout"
    elif any(part in key for key in shapes for part in (".lora_A.", ".lora_down.", "lora_linear_layer")):
        kind = "a LoRA or DoRA"
    elif "placeholder_token" in header.metadata:
        kind = "a word of textual inversion"
    elif any(key.startswith("unet.") for key in shapes):
        kind = "weights of a run: U-Net, and the text encoder where it is trained"
    elif any(key.endswith("embeddings.token_embedding.weight") for key in shapes):
        kind = "weights of a text encoder"
    metadata = {f"metadata.{key}": value for key, value in sorted(header.metadata.items())}
    return {"kind": kind, **_summary(header), **facts, **metadata}


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
        return read_json(path)
    from .plain_yaml import parse

    if path.stat().st_size > MAX_TEXT_BYTES:
        raise InputError(f"{path}: over {in_bytes(MAX_TEXT_BYTES)}, too large for a configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read as a UTF-8 text file") from None
    tree = parse(text, str(path))
    stack, nodes = [tree], 0
    while stack and nodes <= MAX_NODES:
        value = stack.pop()
        stack += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        nodes += 1
    if stack:
        raise InputError(f"{path}: over {MAX_NODES} values, too many for a configuration")
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds a {type(tree).__name__}, where sections were expected")
    return tree


def _count(values: Mapping[str, Any], *, ignore_unknown: bool = False) -> dict[str, Any]:
    """Builds the U-Net without memory for its weights. Raises InputError where the config is not supported."""
    import torch

    from .config import UNetConfig
    from .unet import UNet

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
    ignored = _ignored(values, _known()["UNet2DConditionModel"])
    described = {"parameters": f"{parameters:,}", **{key: facts.get(key) for key in shown}}
    return described | ({"ignored keys": ignored} if ignored else {})


def _picture(path: Path) -> dict[str, Any]:
    import warnings

    from PIL import Image

    from .images import RECORD

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("PNG",)) as image:
            facts = {"kind": "picture", "size": f"{image.width}x{image.height}", "mode": image.mode}
            texts = image.info
        record = parse_object(texts[RECORD].encode(), RECORD) if isinstance(texts.get(RECORD), str) else None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: has too many pixels for a picture") from None
    except Exception as error:  # decoders raise nearly everything on a damaged file
        raise InputError(f"{path}: damaged, or no PNG file: {error}") from None
    if isinstance(record, dict):
        return {**facts, **{f"record.{key}": value for key, value in record.items()}}
    return {**facts, "record": "none: not drawn by diffusion-unet, or written anew since"}
