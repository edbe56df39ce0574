"""The settings of a training run: one YAML file, and overrides `--section.key=value` applied after it, in order.

The dataclasses below are the list of all settings: name, type, default, and a text that gives the unit and what null
means. Nothing here imports torch, so that `--help` stays instant.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from diffusion_unet.errors import InputError

from .settings import REQUIRED, Setting, apply, build, explain, leaves, parse, setting, show

POLYNOMIAL_END = 1e-7  # the last rate of diffusers' polynomial schedule


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    vocab_size: int = setting(
        1024, "entries of the byte-level BPE vocabulary, at least 514 (256 bytes, twice, and 2 marks)", low=514
    )
    max_length: int = setting(32, "tokens of a caption, start and end marks included; longer captions are cut", low=3)


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    hidden_size: int = setting(128, "width of the context; equals the U-Net's cross_attention_dim", low=1)
    num_hidden_layers: int = setting(2, "transformer layers", low=1)
    num_attention_heads: int = setting(4, "attention heads; divides hidden_size", low=1)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal["linear", "scaled_linear", "cosine", "flow", "edm"] = setting(
        "scaled_linear", "the family of noise schedules"
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = setting(
        None, "what the network puts out, for linear, scaled_linear and cosine; null is epsilon"
    )
    num_train_timesteps: int | None = setting(None, "timesteps T, not for edm; null is 1000", low=2)
    beta_start: float | None = setting(
        None, "first beta of linear (null: 1e-4) and scaled_linear (null: 0.00085)", low=0.0, high=1.0
    )
    beta_end: float | None = setting(
        None, "last beta of linear (null: 0.02) and scaled_linear (null: 0.012)", low=0.0, high=1.0
    )
    zero_snr: bool = setting(
        False, "rescale the betas so that the last timestep is pure noise (not for epsilon, flow and edm)"
    )
    shift: float | None = setting(None, "timestep shift of flow; null is 1.0", low=0.0)
    sigma_data: float | None = setting(None, "standard deviation of the data for edm; null is 0.5", low=0.0)
    sigma_min: float | None = setting(None, "lowest noise level of edm; null is 0.002", low=0.0)
    sigma_max: float | None = setting(None, "highest noise level of edm; null is 80", low=0.0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    pretrained: str | None = setting(
        None, "model folder to fine-tune; null trains from nothing, and then `unet` is required"
    )
    unet: dict[str, Any] | None = field(
        default=None, metadata=explain("the U-Net as in diffusers' unet/config.json; null with `pretrained`")
    )
    text_encoder: TextEncoderConfig | None = field(
        default_factory=TextEncoderConfig,
        metadata=explain("a new CLIP text encoder; null with a U-Net without cross-attention; part of `pretrained`"),
    )
    tokenizer: TokenizerConfig = field(
        default_factory=TokenizerConfig,
        metadata=explain("a new tokenizer, trained on the captions; part of `pretrained`"),
    )
    schedule: ScheduleConfig = field(
        default_factory=ScheduleConfig, metadata=explain("the noise schedule; part of `pretrained`")
    )
    train_text_encoder: bool | None = setting(None, "null trains a new text encoder and freezes a pretrained one")
    pixel_mean: float | None = setting(
        None, "mean of the images in [-1, 1], subtracted; null measures it; part of `pretrained`"
    )
    pixel_std: float | None = setting(
        None,
        "standard deviation of the images in [-1, 1], divided by; null measures it; part of `pretrained`",
        low=1e-3,
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train_data_dir: str = setting(
        REQUIRED,
        "folder with metadata.jsonl, with images and .txt beside them, or saved by datasets' save_to_disk; or"
        ' "fashion-mnist" or "twemoji"',
        fixed=False,
    )
    image_column: str | None = setting(
        None,
        "key or column of the image; null is file_name in metadata.jsonl (a path within the folder) and image in a"
        " saved data set",
        fixed=False,
    )
    caption_column: str = setting(
        "text", "key or column of the caption, or of a list of captions to choose from", fixed=False
    )
    resolution: int = setting(
        32,
        "side of the training images in pixels: the shorter side is scaled to it, the longer cropped",
        low=1,
        high=16384,
    )
    center_crop: bool = setting(False, "crop the middle; otherwise a place drawn anew each time")
    random_flip: bool = setting(False, "mirror half of the images, left to right")
    background: str = setting("white", "colour under transparent pixels, as Pillow spells colours")
    caption_dropout: float = setting(
        0.1, "share of the images trained with the empty caption, for guidance", low=0.0, high=1.0
    )
    max_train_samples: int | None = setting(None, "use the first samples only; null uses all", low=1, fixed=False)
    held_out: int = setting(0, "images kept from training, for the held-out loss", low=0)
    max_bad_fraction: float = setting(
        0.01,
        "share of images or captions that may be unusable before the run is refused",
        low=0.0,
        high=1.0,
        fixed=False,
    )
    cache_in_memory: int = setting(
        2048, "megabytes of decoded images to keep; beyond it they are decoded at each use", low=0, fixed=False
    )
    license: str | None = setting(None, "licence of the images, for the model card; null leaves it out", fixed=False)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    noise_distribution: Literal["uniform", "lognormal"] = setting(
        "lognormal",
        "uniform: timesteps; lognormal: ln sigma is normal (for flow that is the logit-normal distribution)",
    )
    ln_sigma_mean: float | None = setting(None, "mean of ln sigma, lognormal only; null is -0.6")
    ln_sigma_std: float | None = setting(None, "standard deviation of ln sigma, lognormal only; null is 1.2", low=1e-3)
    stratified: bool = setting(True, "spread the noise levels of a batch evenly over the distribution")
    weighting: Literal["none", "min_snr", "edm"] = setting("none", "weight of the squared error by noise level")
    snr_gamma: float | None = setting(None, "ceiling of the SNR, min_snr only; null is 5", low=1e-3)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = setting(1e-4, "peak rate of AdamW", low=0.0)
    text_encoder_lr: float | None = setting(None, "peak rate of the text encoder; null is learning_rate", low=0.0)
    muon_lr: float | None = setting(
        None,
        "peak rate of Muon for the weights between the U-Net's first and last layer; null trains all with AdamW",
        low=1e-9,
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant_with_warmup", "course of the rate over max_train_steps, as diffusers' get_scheduler names it")
    lr_warmup_steps: int = setting(0, "steps over which the rate rises from 0 (constant: none)", low=0)
    adam_beta1: float = setting(0.9, "decay of the first moment", low=0.0, high=0.999999)
    adam_beta2: float = setting(0.999, "decay of the second moment", low=0.0, high=0.999999)
    adam_weight_decay: float = setting(1e-2, "decoupled weight decay", low=0.0)
    adam_epsilon: float = setting(1e-8, "added to the root of the second moment", low=0.0)
    max_grad_norm: float | None = setting(1.0, "largest norm of the gradient; null does not clip", low=0.0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    output_dir: str = setting(REQUIRED, "the run folder: checkpoints, metrics.jsonl, previews", fixed=False)
    seed: int = setting(0, "key of every random number of the run", low=0, high=2**63 - 1)
    max_train_steps: int = setting(1000, "optimizer steps", low=1, fixed=False)
    train_batch_size: int = setting(
        64, "images of one optimizer step, over all processes and micro-batches together", low=1
    )
    gradient_accumulation_steps: int = setting(
        1, "micro-batches into which each process cuts its images of a step", low=1, fixed=False
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "number format of the forward pass; no is float32")
    channels_last: bool = setting(
        True, "keep images and convolutions in channels-last memory order, faster on most machines", fixed=False
    )
    ema_decay: float | None = setting(
        0.9999,
        "decay per step of the averaged weights, (1 + n)/(10 + n) in the first n steps; null keeps none",
        low=0.0,
        high=1.0,
    )
    checkpointing_steps: int = setting(500, "steps from one checkpoint to the next", low=1, fixed=False)
    checkpoints_total_limit: int | None = setting(2, "checkpoints kept, at least 2; null keeps all", low=2, fixed=False)


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    validation_prompts: tuple[str, ...] = setting((), "prompts of the preview grid; [] draws none", fixed=False)
    num_validation_images: int = setting(4, "pictures for each prompt, of seeds 0, 1, ...", low=1, fixed=False)
    validation_steps: int = setting(500, "steps from one preview and held-out loss to the next", low=1, fixed=False)
    num_inference_steps: int = setting(20, "sampling steps of a picture", low=1, fixed=False)
    guidance_scale: float = setting(4.0, "classifier-free guidance of a picture; 1 is none", low=0.0, fixed=False)


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig, metadata=explain("what is trained"))
    data: DataConfig = field(default_factory=DataConfig, metadata=explain("what it is trained on"))
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig, metadata=explain("noise levels and loss"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig, metadata=explain("AdamW and its rate"))
    train: TrainConfig = field(default_factory=TrainConfig, metadata=explain("the run"))
    validation: ValidationConfig = field(
        default_factory=ValidationConfig, metadata=explain("what is looked at on the way")
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `--section.key=value` overrides in order, checks types, ranges and combinations.

    Values of overrides are YAML too: `--optimizer.learning_rate=1e-3`, `--validation.validation_prompts=[a cat, a
    dog]`; for settings that are text, they are the text. Raises InputError, one line that names the key, the value and
    what is expected."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a UTF-8 text file ({type(error).__name__})") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as `train:`, got {show(tree)}")
    for override in overrides:
        apply(Config, tree, override)
    return config_from_dict(tree, str(path))


def config_from_dict(tree: Mapping[str, Any], source: str) -> Config:
    """A Config from nested mappings, as `to_dict` gives them; `source` names them in messages. Raises InputError."""
    config: Config = build(Config, dict(tree), source)
    check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as JSON holds them: mappings, lists, numbers, strings, null."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def settings() -> list[Setting]:
    """Every setting and, before its settings, every section (whose `type` is empty)."""
    return list(leaves(Config))


def help_text() -> str:
    """All settings with types, defaults and explanations, one a line, under headings of the sections."""
    return "\n".join(
        f"  --{item.key}={item.default}  ({item.type}) {item.help}" if item.type else f"{item.key}: {item.help}"
        for item in settings()
    )


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings, as 'key: old -> new', that a run may not be resumed with; both as `to_dict` gives them."""
    changes = []
    for item in settings():
        if item.type and item.fixed:
            before, after = _get(old, item.key), _get(new, item.key)
            if before != after:
                changes.append(f"{item.key}: {show(before)} -> {show(after)}")
    return changes


def _get(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def check(config: Config) -> None:
    """Raises InputError for settings that contradict each other."""
    model, objective, schedule = config.model, config.objective, config.model.schedule
    _refuse(
        (model.pretrained is None) == (model.unet is None),
        "model.unet or model.pretrained: give exactly one of the two",
    )
    if model.pretrained is None:
        _check_schedule(schedule)
    else:
        default = ModelConfig(pretrained=model.pretrained, train_text_encoder=model.train_text_encoder)
        for name, value in vars(default).items():
            _refuse(getattr(model, name) != value, f"model.{name}: comes with model.pretrained; take it out")
    if objective.noise_distribution != "lognormal":
        for key in ("ln_sigma_mean", "ln_sigma_std"):
            _refuse(getattr(objective, key) is not None, f"objective.{key}: only with noise_distribution lognormal")
    _refuse(
        objective.snr_gamma is not None and objective.weighting != "min_snr",
        "objective.snr_gamma: only with weighting min_snr",
    )
    trained = model.train_text_encoder if model.train_text_encoder is not None else model.pretrained is None
    _refuse(
        config.optimizer.text_encoder_lr is not None and not (trained and (model.pretrained or model.text_encoder)),
        "optimizer.text_encoder_lr: no text encoder is trained; take it out, or set model.train_text_encoder",
    )
    _refuse(
        config.optimizer.muon_lr is not None and config.train.mixed_precision == "fp16",
        "optimizer.muon_lr: Muon cannot leave out a step whose scaled gradients are infinite; take bf16 or no",
    )
    batch, micro = config.train.train_batch_size, config.train.gradient_accumulation_steps
    _refuse(micro > batch, f"train.gradient_accumulation_steps: {micro} is more than train_batch_size ({batch})")
    _refuse(
        config.optimizer.lr_scheduler == "polynomial" and config.optimizer.learning_rate <= POLYNOMIAL_END,
        f"optimizer.learning_rate: polynomial falls to {POLYNOMIAL_END:g}, so it must be above that",
    )
    if config.optimizer.lr_scheduler == "constant":
        _refuse(
            config.optimizer.lr_warmup_steps > 0,
            "optimizer.lr_warmup_steps: take lr_scheduler constant_with_warmup, or 0",
        )


def _check_schedule(schedule: ScheduleConfig) -> None:
    only = {
        "prediction_type": ("linear", "scaled_linear", "cosine"),
        "num_train_timesteps": ("linear", "scaled_linear", "cosine", "flow"),
        "beta_start": ("linear", "scaled_linear"),
        "beta_end": ("linear", "scaled_linear"),
        "zero_snr": ("linear", "scaled_linear", "cosine"),
        "shift": ("flow",),
        "sigma_data": ("edm",),
        "sigma_min": ("edm",),
        "sigma_max": ("edm",),
    }
    for key, kinds in only.items():
        given = getattr(schedule, key) not in (None, False)
        _refuse(
            given and schedule.kind not in kinds,
            f"model.schedule.{key}: only with kind {', '.join(kinds)}, not {schedule.kind}",
        )
    epsilon = schedule.prediction_type in (None, "epsilon")
    _refuse(
        schedule.zero_snr and epsilon,
        "model.schedule.zero_snr: needs prediction_type v_prediction or sample, not epsilon",
    )


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise InputError(message)
