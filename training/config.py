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

ADAMW = "torch.optim:AdamW"
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
        None, "first beta of linear (null: 1e-4) and scaled_linear (null: 0.00085)", above=0, high=1.0
    )
    beta_end: float | None = setting(
        None, "last beta of linear (null: 0.02) and scaled_linear (null: 0.012)", above=0, high=1.0
    )
    zero_snr: bool = setting(False, "rescale the betas so that the last timestep is pure noise (not for epsilon)")
    shift: float | None = setting(None, "timestep shift of flow; null is 1.0", above=0)
    sigma_data: float | None = setting(None, "standard deviation of the data for edm; null is 0.5", above=0)
    sigma_min: float | None = setting(None, "lowest noise level of edm; null is 0.002", above=0)
    sigma_max: float | None = setting(None, "highest noise level of edm; null is 80", above=0)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    kind: Literal["lora", "dora"] = setting("lora", "low-rank difference (lora), or that of directions (dora)")
    rank: int = setting(16, "rank of the difference", low=1)
    alpha: float | None = setting(None, "the difference is multiplied by alpha / rank; null is rank", above=0)
    target_modules: tuple[str, ...] = setting(
        ("to_q", "to_k", "to_v", "to_out.0"), "ends of the names of the layers that are adapted, as peft takes them"
    )
    dropout: float = setting(0.0, "share of the adapter's inputs set to zero", low=0.0, high=0.99)


@dataclasses.dataclass(frozen=True)
class TextualInversionConfig:
    placeholder_token: str = setting(REQUIRED, "the new word, such as <my-cat>, which captions hold")
    initializer_token: str = setting(REQUIRED, "a word of one token, such as cat, that the new one starts as")
    num_vectors: int = setting(1, "vectors of the text encoder for the new word", low=1, high=64)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    pretrained: str | None = setting(
        None,
        "model folder to fine-tune, or a single .safetensors file of it; null trains from nothing, and then `unet` is"
        " required",
        fixed=False,
    )
    pretrained_config: str | None = setting(
        None, "the model folder whose configs and tokenizers belong to a single file; null with a folder", fixed=False
    )
    task: Literal["text-to-image", "inpaint", "instruct-pix2pix"] = setting(
        "text-to-image",
        "what is drawn from: text alone, a picture with a hole, or a picture to change; the U-Net's conv_in is widened"
        " where it does not take that yet",
    )
    unet: dict[str, Any] | None = field(
        default=None, metadata=explain("the U-Net as in diffusers' unet/config.json; null with `pretrained`")
    )
    vae: str | None = setting(
        None, "folder of the autoencoder in whose latents a new U-Net works; null: pixels; part of `pretrained`"
    )
    pretrained_text_encoder: str | None = setting(
        None, "model folder whose text encoder and tokenizer a new U-Net takes; null: new ones"
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
        default_factory=ScheduleConfig,
        metadata=explain("the noise schedule; of `pretrained` its own, unless any of this is set"),
    )
    train_text_encoder: bool | None = setting(None, "null trains a new text encoder and freezes a pretrained one")
    adapter: AdapterConfig | None = field(
        default=None,
        metadata=explain("LoRA or DoRA beside the frozen weights of `pretrained`; null trains the weights"),
    )
    textual_inversion: TextualInversionConfig | None = field(
        default=None, metadata=explain("a new word, trained while all else of `pretrained` is frozen; null trains none")
    )
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
    train_data_dir: str | None = setting(
        None,
        "folder of images with metadata.jsonl, metadata.csv, .txt or .caption beside them, or in folders named by what"
        " they show; of .parquet files; of webdataset .tar files; saved by datasets' save_to_disk; or"
        ' "fashion-mnist" or "twemoji"; null with dataset_name',
        fixed=False,
    )
    dataset_name: str | None = setting(None, "data set of the Hugging Face hub; null with train_data_dir", fixed=False)
    dataset_config_name: str | None = setting(None, "configuration of dataset_name; null is its default", fixed=False)
    split: str = setting("train", "split of dataset_name, or of a saved data set that has several", fixed=False)
    streaming: Literal["index", "pure"] | None = setting(
        None,
        "index: dataset_name is streamed into local shards first; pure: trained on as it comes; null: downloaded first",
        fixed=False,
    )
    shuffle_buffer: int = setting(
        1000, "rows of a pure stream that each process holds and takes from at random", low=1, fixed=False
    )
    image_column: str | None = setting(
        None,
        "key or column of the image; null is file_name in metadata (a path within the folder) and image in a data set",
        fixed=False,
    )
    caption_column: str = setting(
        "text", "key or column of the caption, or of a list of captions to choose from", fixed=False
    )
    label_column: str | None = setting(
        None, "key or column of the class, for a U-Net with num_class_embeds; null: the folder's name", fixed=False
    )
    original_image_column: str | None = setting(
        None,
        "key or column of the picture to be changed, for model.task instruct-pix2pix; null for others",
        fixed=False,
    )
    instance_prompt: str | None = setting(None, "caption of every image (DreamBooth); null: their own", empty=True)
    class_data_dir: str | None = setting(
        None,
        "folder of images of the same class as the instances, for prior preservation (DreamBooth); null for none",
        fixed=False,
    )
    class_prompt: str | None = setting(None, "caption of the images of class_data_dir; null without it")
    num_class_images: int = setting(
        100, "images that class_data_dir is to hold; missing ones are drawn by the model before it is trained", low=1
    )
    prior_loss_weight: float = setting(1.0, "what the loss of an image of class_data_dir counts", low=0.0)
    resolution: int = setting(
        32,
        "side of the training images in pixels: the shorter side is scaled to it, the longer cropped; with"
        " aspect_buckets the root of their area",
        low=1,
        high=16384,
    )
    aspect_buckets: bool = setting(False, "train at several aspect ratios of about resolution^2 pixels, little cropped")
    bucket_step: int = setting(64, "sides of buckets are multiples of this many pixels", low=1)
    max_aspect: float = setting(2.0, "largest ratio of a bucket's sides", low=1.0, high=8.0)
    center_crop: bool = setting(False, "crop the middle; otherwise a place drawn anew each time")
    random_flip: bool = setting(False, "mirror half of the images, left to right")
    background: str = setting("white", "colour under transparent pixels, as Pillow spells colours")
    caption_dropout: float = setting(
        0.1, "share of the images trained with the empty caption or the null class, for guidance", low=0.0, high=1.0
    )
    shuffle_tags: bool = setting(False, "put the parts of a caption, cut at tag_separator, into an order drawn anew")
    keep_tags: int = setting(1, "parts at the front that shuffle_tags leaves in place", low=0)
    tag_separator: str = setting(",", "what stands between the parts")
    min_size: int = setting(1, "images with a shorter side below this many pixels are not used", low=1)
    max_train_samples: int | None = setting(None, "use the first samples only; null uses all", low=1, fixed=False)
    held_out: int = setting(0, "images kept from training, for the held-out loss", low=0)
    max_bad_fraction: float = setting(
        0.01,
        "share of images or captions that may be unusable before the run is refused",
        low=0.0,
        high=1.0,
        fixed=False,
    )
    look: Literal["full", "quick"] = setting(
        "full", "full: decode every image that was not decoded before; quick: read sizes and captions only"
    )
    cache_in_memory: int = setting(
        2048, "megabytes of decoded images that each process keeps; others are decoded at each use", low=0, fixed=False
    )
    cache_latents: bool = setting(
        False, "encode all images once, before the first step, and keep the autoencoder's mean and variance on disk"
    )
    cache_crops: int = setting(1, "crops of each image in that cache, of which each use takes one", low=1)
    cache_text: bool = setting(
        False, "encode all captions once with the frozen text encoder, and keep the result on disk"
    )
    cache_dir: str | None = setting(None, "folder of caches; null is the run's own", fixed=False)
    license: str | None = setting(None, "licence of the images, for the model card; null leaves it out", fixed=False)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    noise_distribution: str = setting(
        "lognormal",
        "uniform: timesteps; lognormal: ln sigma is normal; logit_normal: logit of a flow's time is normal, which is"
        " the same in its own words; or package.module:function, called with u in (0, 1), the schedule and noise_args",
    )
    noise_args: dict[str, Any] | None = field(
        default=None, metadata=explain("arguments of a noise_distribution of your own; null is none")
    )
    ln_sigma_mean: float | None = setting(None, "mean of ln sigma, lognormal and logit_normal only; null is -0.6")
    ln_sigma_std: float | None = setting(
        None, "standard deviation of ln sigma, lognormal and logit_normal only; null is 1.2", low=1e-3
    )
    stratified: bool = setting(True, "spread the noise levels of a batch evenly over the distribution")
    resolution_shift: int | None = setting(
        None,
        "side in pixels for which the noise levels are meant: at others sigma is multiplied by the ratio of the sides;"
        " null leaves it",
        low=1,
    )
    weighting: Literal["none", "min_snr", "soft_min_snr", "edm"] = setting(
        "none", "weight of the squared error by noise level"
    )
    snr_gamma: float | None = setting(None, "ceiling of the SNR, min_snr and soft_min_snr only; null is 5", low=1e-3)
    learned_weighting: bool = setting(
        False, "divide each loss by what is usual at its noise level, learned on the way (EDM2)"
    )
    loss: Literal["mse", "huber"] = setting("mse", "squared error, or one that grows linearly far from zero")
    huber_c: float | None = setting(None, "where huber turns linear; null is 0.1", above=0)
    noise_offset: float = setting(
        0.0, "share of noise that is the same in all of an image, so that dark and bright pictures are learned", low=0.0
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    optimizer: str = setting(
        ADAMW, "class of the optimizer, package.module:Class; adam_* and muon_lr are for AdamW only"
    )
    optimizer_args: dict[str, Any] | None = field(
        default=None, metadata=explain("arguments of another optimizer than AdamW, besides its rate; null is none")
    )
    learning_rate: float = setting(1e-4, "peak rate", low=0.0)
    text_encoder_lr: float | None = setting(None, "peak rate of the text encoder; null is learning_rate", low=0.0)
    muon_lr: float | None = setting(
        None,
        "peak rate of Muon for the weights between the U-Net's first and last layer; null trains all with AdamW",
        above=0,
    )
    group_lr: dict[str, Any] | None = field(
        default=None,
        metadata=explain("peak rates by regular expression over parameter names, the first that fits; null has none"),
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant_with_warmup", "course of the rate over max_train_steps, as diffusers' get_scheduler names it")
    lr_warmup_steps: int = setting(0, "steps over which the rate rises from 0 (constant: none)", low=0)
    adam_beta1: float = setting(0.9, "decay of the first moment", low=0.0, high=0.999999)
    adam_beta2: float = setting(0.999, "decay of the second moment", low=0.0, high=0.999999)
    adam_weight_decay: float = setting(1e-2, "decoupled weight decay", low=0.0)
    adam_epsilon: float = setting(1e-8, "added to the root of the second moment", low=0.0)
    max_grad_norm: float | None = setting(1.0, "largest norm of the gradient; null does not clip", above=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    output_dir: str = setting(REQUIRED, "the run folder: checkpoints, metrics.jsonl, previews", fixed=False)
    seed: int = setting(0, "key of every random number of the run", low=0, high=2**63 - 1)
    max_train_steps: int = setting(1000, "optimizer steps", low=1, fixed=False)
    train_batch_size: int = setting(64, "images of one optimizer step, over all processes and micro-batches", low=1)
    gradient_accumulation_steps: int = setting(
        1, "micro-batches into which each process cuts its images of a step", low=1, fixed=False
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "number format of the forward pass; no is float32")
    channels_last: bool = setting(
        True, "keep images and convolutions in channels-last memory order, faster on most machines", fixed=False
    )
    gradient_checkpointing: bool = setting(
        False, "compute the blocks anew on the way back: less memory, a third more time", fixed=False
    )
    compile: bool = setting(False, "torch.compile the U-Net", fixed=False)
    allow_tf32: bool = setting(False, "faster, less exact products of float32 on NVIDIA GPUs", fixed=False)
    ema: tuple[str, ...] = setting(
        ("0.9999",),
        'averages of the weights: "0.9999", the decay per step, (1 + n)/(10 + n) in the first n steps;'
        ' "constant-0.999", without that; "power-0.05", of this width relative to the run (EDM2); the first is what is'
        " drawn with and exported; [] keeps none",
    )
    checkpointing_steps: int = setting(500, "steps from one checkpoint to the next", low=1, fixed=False)
    checkpoints_total_limit: int | None = setting(2, "checkpoints kept, at least 2; null keeps all", low=2, fixed=False)
    heartbeat_timeout: int = setting(10, "seconds of silence after which a process counts as dead", low=3, fixed=False)
    report_to: tuple[str, ...] = setting(
        (), "trackers of accelerate that are told all metrics: tensorboard, wandb, ...", fixed=False
    )


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

    Values of overrides are YAML too: `--validation.validation_prompts=[a cat, a dog]`; for settings that are text, they
    are the text. Raises InputError, one line that names the key, the value and what is expected."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"{path}: the config file cannot be read ({reason})") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as `train:`, got {show(tree)}")
    for override in overrides:
        apply(Config, tree, override)
    return config_from_dict(tree, str(path), overrides)


def config_from_dict(tree: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """A Config from nested mappings, as `to_dict` gives them; `source` names them in messages. Raises InputError."""
    from .checks import check

    config: Config = build(Config, dict(tree), source, overrides)
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


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of each setting that a run may not be resumed with; both as `to_dict` gives them."""
    pairs = [(item.key, _get(old, item.key), _get(new, item.key)) for item in settings() if item.type and item.fixed]
    return [(key, before, after) for key, before, after in pairs if before != after]


def _get(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
