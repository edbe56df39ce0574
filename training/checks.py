"""Settings that contradict each other, each refused in one line that names the key and the remedy; no torch here."""

import math
from pathlib import Path

from diffusion_unet.errors import InputError

from . import averages
from .config import (
    ADAMW,
    POLYNOMIAL_END,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from .folders import has_metadata

ALL_KNOWN = ("class_data_dir", "label_column", "aspect_buckets", "held_out", "look", "cache_latents", "cache_text")
NEW_MODEL = ("vae", "pretrained_text_encoder", "text_encoder", "tokenizer", "pixel_mean", "pixel_std")


def check(config: Config) -> None:
    """Raises InputError for settings that contradict each other."""
    _check_model(config.model)
    _refuse(
        bool(config.validation.validation_prompts) and config.model.task != "text-to-image",
        f"validation.validation_prompts: {config.model.task} draws from pictures, not prompts alone; take them out",
    )
    _check_data(config.data, config.model)
    _check_folders(config)
    _check_objective(config.objective)
    _check_optimizer(config)
    _check_train(config.train)


def trains_text(config: ModelConfig) -> bool:
    """Whether the text encoder is trained: a new one by default, a pretrained one only when asked."""
    if config.train_text_encoder is None:
        return config.pretrained is None and config.pretrained_text_encoder is None
    return config.train_text_encoder


def images_at_once(config: Config, processes: int) -> int:
    """Images of a micro-batch."""
    return max(1, config.train.train_batch_size // (processes * config.train.gradient_accumulation_steps))


def _check_model(model: ModelConfig) -> None:
    _refuse(
        (model.pretrained is None) == (model.unet is None),
        "model.unet or model.pretrained: give exactly one of the two",
    )
    _check_schedule(model.schedule)
    told = model.pretrained or model.text_encoder or model.pretrained_text_encoder
    _refuse(
        model.train_text_encoder is not None and not told,
        "model.train_text_encoder: there is no text encoder; take it out",
    )
    if model.pretrained is None:
        for name in ("adapter", "textual_inversion", "pretrained_config"):
            _refuse(getattr(model, name) is not None, f"model.{name}: only with model.pretrained")
    else:
        for name in NEW_MODEL:
            untouched = getattr(ModelConfig(), name)
            _refuse(getattr(model, name) != untouched, f"model.{name}: comes with model.pretrained; take it out")
    told_text = model.text_encoder or model.pretrained_text_encoder
    classes = (model.unet or {}).get("num_class_embeds") is not None
    _refuse(
        model.vae is not None and (classes or not told_text),
        "model.vae: no pipeline draws latents from classes or from nothing, so a model on latents needs a text encoder:"
        " give one, or train on pixels",
    )
    _refuse(
        classes and bool(told_text),
        "model.text_encoder: a U-Net with num_class_embeds is told classes, not captions: set it to null, and take"
        " blocks without CrossAttn",
    )
    if model.textual_inversion is not None:
        _refuse(model.adapter is not None, "model.adapter: a new word is trained alone; take one of the two out")
        _refuse(
            model.train_text_encoder is not None,
            "model.train_text_encoder: textual_inversion trains the new word alone; take it out",
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


def _check_data(data: DataConfig, model: ModelConfig) -> None:
    _refuse(
        (data.train_data_dir is None) == (data.dataset_name is None),
        "data.train_data_dir is missing: a folder of captioned images, or the name of a data set as data.dataset_name"
        if data.dataset_name is None
        else "data.dataset_name: train_data_dir is given too; take one of the two out",
    )
    if data.dataset_name is None:
        for name in ("dataset_config_name", "streaming"):
            _refuse(getattr(data, name) is not None, f"data.{name}: only with data.dataset_name")
    _check_stream(data)
    edits = model.task == "instruct-pix2pix"
    _refuse(
        edits and data.original_image_column is None,
        "data.original_image_column is missing: the pictures that model.task instruct-pix2pix changes",
    )
    _refuse(
        data.original_image_column is not None and not edits,
        "data.original_image_column: only with model.task instruct-pix2pix",
    )
    prior = data.class_data_dir is not None
    _refuse(
        prior != (data.class_prompt is not None),
        "data.class_data_dir and data.class_prompt: prior preservation needs both",
    )
    _refuse(prior and data.aspect_buckets, "data.aspect_buckets: not with class_data_dir; take it out")
    only = {
        "aspect_buckets": ("max_aspect", "bucket_step"),
        "shuffle_tags": ("keep_tags", "tag_separator"),
        "class_data_dir": ("num_class_images", "prior_loss_weight"),
    }
    for switch, names in only.items():
        for name in names:
            changed = getattr(data, name) != getattr(DataConfig(), name)
            _refuse(not getattr(data, switch) and changed, f"data.{name}: only with data.{switch}")
    _refuse(not data.tag_separator.strip(), "data.tag_separator: must not be empty; a comma is usual")
    _refuse(
        data.cache_crops > 1 and (data.center_crop or not data.cache_latents),
        "data.cache_crops: only with data.cache_latents, and without data.center_crop",
    )
    _refuse(
        data.cache_text and data.shuffle_tags, "data.cache_text: captions with shuffle_tags have no end; take one out"
    )
    trained = trains_text(model) or model.textual_inversion is not None
    _refuse(
        data.cache_text and trained, "data.cache_text: the text encoder is trained, so its answers change; take it out"
    )


def _check_folders(config: Config) -> None:
    """Pictures that a run writes are not to be images that it, or the next one, is trained on."""
    images = Path(config.data.train_data_dir or "")
    if config.data.train_data_dir is None or not images.is_dir() or has_metadata(images):  # which lists the images
        return
    written = {"train.output_dir": config.train.output_dir, "data.class_data_dir": config.data.class_data_dir}
    for key, folder in written.items():
        _refuse(
            folder is not None and Path(folder).resolve().is_relative_to(images.resolve()),
            f"{key}: {folder} lies in data.train_data_dir, where all images are trained on; take another",
        )


def _check_stream(data: DataConfig) -> None:
    """Of a stream that is not indexed nothing is known before it comes."""
    pure = data.streaming == "pure"
    _refuse(
        data.shuffle_buffer != DataConfig().shuffle_buffer and not pure,
        "data.shuffle_buffer: only with data.streaming pure",
    )
    for name in ALL_KNOWN:
        _refuse(
            pure and getattr(data, name) != getattr(DataConfig(), name),
            f"data.{name}: needs to know all images before the first step; take it out, or set data.streaming to index",
        )


def _check_objective(objective: ObjectiveConfig) -> None:
    kind, own = objective.noise_distribution, ":" in objective.noise_distribution
    _refuse(
        kind not in ("uniform", "lognormal", "logit_normal") and not own,
        f"objective.noise_distribution: {kind} is none of uniform, lognormal, logit_normal and package.module:function",
    )
    if kind not in ("lognormal", "logit_normal"):
        for key in ("ln_sigma_mean", "ln_sigma_std"):
            _refuse(
                getattr(objective, key) is not None,
                f"objective.{key}: only with noise_distribution lognormal or logit_normal",
            )
    _refuse(objective.noise_args is not None and not own, "objective.noise_args: only with a function of your own")
    _refuse(
        objective.snr_gamma is not None and objective.weighting not in ("min_snr", "soft_min_snr"),
        "objective.snr_gamma: only with weighting min_snr or soft_min_snr",
    )
    _refuse(objective.huber_c is not None and objective.loss != "huber", "objective.huber_c: only with loss huber")


def _check_optimizer(config: Config) -> None:
    optimizer, model = config.optimizer, config.model
    has_text = model.pretrained or model.text_encoder or model.pretrained_text_encoder
    _refuse(
        optimizer.text_encoder_lr is not None and not (trains_text(model) and has_text),
        "optimizer.text_encoder_lr: no text encoder is trained; take it out, or set model.train_text_encoder",
    )
    _refuse(
        optimizer.muon_lr is not None and config.train.mixed_precision == "fp16",
        "optimizer.muon_lr: Muon cannot leave out a step whose scaled gradients are infinite; take bf16 or no",
    )
    if optimizer.optimizer == ADAMW:
        _refuse(optimizer.optimizer_args is not None, "optimizer.optimizer_args: AdamW's are the settings adam_*")
    else:
        for name in ("muon_lr", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"):
            _refuse(
                getattr(optimizer, name) != getattr(OptimizerConfig(), name),
                f"optimizer.{name}: only with {ADAMW}; give arguments of another class as optimizer.optimizer_args",
            )
    for pattern, rate in (optimizer.group_lr or {}).items():
        number = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate < math.inf
        _refuse(
            not number, f"optimizer.group_lr: the rate of {pattern!r} is {rate!r}; a number of at least 0 is needed"
        )
    _refuse(
        optimizer.lr_scheduler == "polynomial" and optimizer.learning_rate <= POLYNOMIAL_END,
        f"optimizer.learning_rate: polynomial falls to {POLYNOMIAL_END:g}, so it must be above that",
    )
    if optimizer.lr_scheduler == "constant":
        _refuse(
            optimizer.lr_warmup_steps > 0,
            "optimizer.lr_warmup_steps: take lr_scheduler constant_with_warmup, or 0",
        )


def _check_train(train: TrainConfig) -> None:
    batch, micro = train.train_batch_size, train.gradient_accumulation_steps
    _refuse(micro > batch, f"train.gradient_accumulation_steps: {micro} is more than train_batch_size ({batch})")
    for name in train.ema:
        averages.parse(name)
    _refuse(len(set(train.ema)) < len(train.ema), "train.ema: the same average twice; take one out")


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise InputError(message)
