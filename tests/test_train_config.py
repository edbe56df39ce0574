"""The settings: read strictly, overridden in order, refused in one line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_unet.errors import InputError
from training import config as settings_module
from training.config import Config, changed, config_from_dict, help_text, load_config, settings, to_dict

BASE = "model: {unet: {}}\ndata: {train_data_dir: images}\ntrain: {output_dir: run}\n"


def load(tmp_path: Path, text: str = BASE, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str = BASE, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_yaml_and_defaults(tmp_path: Path) -> None:
    config = load(
        tmp_path, BASE + "optimizer: {learning_rate: 1e-3}\nvalidation: {validation_prompts: [a cat, a dog]}\n"
    )
    assert config.optimizer.learning_rate == 1e-3
    assert config.validation.validation_prompts == ("a cat", "a dog")
    assert config.data.train_data_dir == "images"
    assert config.train.mixed_precision == "no"
    assert config.model.schedule.kind == "scaled_linear"
    assert config == config_from_dict(to_dict(config), "itself")


def test_no_is_a_word_and_numbers_are_what_is_meant(tmp_path: Path) -> None:
    config = load(
        tmp_path, BASE.replace("{output_dir: run}", "{output_dir: run, mixed_precision: no, ema: [0.999, power-0.1]}")
    )
    assert config.train.mixed_precision == "no"
    assert config.train.ema == ("0.999", "power-0.1")
    config = load(tmp_path, BASE, "--optimizer.max_grad_norm=1")
    assert config.optimizer.max_grad_norm == 1.0 and isinstance(config.optimizer.max_grad_norm, float)


def test_overrides_are_applied_in_order_after_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        BASE + "optimizer: {learning_rate: 0.1}\n",
        "--optimizer.learning_rate=1e-2",
        "--optimizer.learning_rate=2e-2",
        "--validation.validation_prompts=[red, blue]",
        "--train.ema=[]",
        "--train.output_dir=2024",
        "--model.unet.sample_size=16",
        "--data.train_data_dir=a: b",
    )
    assert config.optimizer.learning_rate == 2e-2
    assert config.validation.validation_prompts == ("red", "blue")
    assert config.train.ema == ()
    assert config.train.output_dir == "2024"
    assert config.model.unet == {"sample_size": 16}
    assert config.data.train_data_dir == "a: b"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--train.max_trian_steps=5"], ["train.max_trian_steps", "the nearest is train.max_train_steps"]),
        (["--train.learning_rate=5"], ["train.learning_rate", "the nearest is optimizer.learning_rate"]),
        (["--trian.seed=5"], ["trian", "the nearest is train"]),
        (["--train.max_train_steps=five"], ["train.max_train_steps", "an integer at least 1", '"five"']),
        (["--train.max_train_steps=0"], ["train.max_train_steps", "at least 1", "got 0"]),
        (["--train.max_train_steps=1.5"], ["train.max_train_steps", "an integer", "1.5"]),
        (["--train.max_train_steps=true"], ["train.max_train_steps", "an integer", "true"]),
        (['--train.max_train_steps="5"'], ["train.max_train_steps", "an integer", '"5"']),
        (["--data.random_flip=1"], ["data.random_flip", "true or false", "got 1"]),
        (["--data.caption_dropout=1.5"], ["data.caption_dropout", "at least 0 and at most 1", "1.5"]),
        (["--optimizer.learning_rate=.nan"], ["optimizer.learning_rate", "a number"]),
        (["--data.resolution=99999"], ["data.resolution", "at most 16384", "99999"]),
        (
            ["--optimizer.lr_scheduler=polynomial", "--optimizer.learning_rate=1e-8"],
            ["optimizer.learning_rate", "polynomial"],
        ),
        (
            ["--optimizer.text_encoder_lr=1e-5", "--model.train_text_encoder=false"],
            ["optimizer.text_encoder_lr", "no text encoder is trained"],
        ),
        (["--optimizer.text_encoder_lr=1e-5", "--model.text_encoder=null"], ["optimizer.text_encoder_lr"]),
        (["--train.mixed_precision=fp8"], ["train.mixed_precision", "one of no, fp16, bf16", '"fp8"']),
        (["--validation.validation_prompts=a cat"], ["validation.validation_prompts", "a list of texts", '"a cat"']),
        (["--validation.validation_prompts=[[1]]"], ["validation.validation_prompts", "a list of texts"]),
        (["--train=5"], ["train", "expected a section", "got 5"]),
        (["--train.seed.x=5"], ["train.seed", "an integer"]),
        (["--train.checkpoints_total_limit=1"], ["train.checkpoints_total_limit", "at least 2"]),
        (["--model.tokenizer.max_lenght=9"], ["model.tokenizer.max_lenght", "model.tokenizer.max_length"]),
        (["train.seed=5"], ["expected --section.key=value"]),
        (["--train.seed"], ["expected --section.key=value"]),
        (["--train.seed=[5"], ["not valid YAML"]),
        (["--model.pretrained=folder"], ["model.unet or model.pretrained"]),
        (["--objective.snr_gamma=5"], ["objective.snr_gamma", "min_snr"]),
        (["--objective.noise_distribution=uniform", "--objective.ln_sigma_std=1"], ["objective.ln_sigma_std"]),
        (["--model.schedule.shift=3"], ["model.schedule.shift", "only with kind flow"]),
        (["--model.schedule.zero_snr=true"], ["model.schedule.zero_snr", "v_prediction"]),
        (["--data.keep_tags=2"], ["data.keep_tags", "only with data.shuffle_tags"]),
        (["--data.tag_separator= "], ["data.tag_separator"]),
        (["--data.num_class_images=5"], ["data.num_class_images", "only with data.class_data_dir"]),
        (["--data.cache_text=true"], ["data.cache_text", "trained"]),
        (["--data.dataset_name=x"], ["data.dataset_name", "train_data_dir"]),
        (["--model.task=instruct-pix2pix"], ["data.original_image_column is missing"]),
        (["--model.adapter.rank=4"], ["model.adapter", "only with model.pretrained"]),
        (["--model.vae=x", "--model.unet.num_class_embeds=4"], ["model.vae: no pipeline draws latents from classes"]),
        (["--model.unet.num_class_embeds=4"], ["model.text_encoder: ", "is told classes", "set it to null"]),
        (["--model.vae=x", "--model.text_encoder=null"], ["model.vae: ", "give one, or train on pixels"]),
        (["--objective.huber_c=1"], ["objective.huber_c", "huber"]),
        (["--objective.noise_distribution=normal"], ["objective.noise_distribution", "logit_normal"]),
        (["--optimizer.optimizer=torch.optim:SGD", "--optimizer.adam_beta1=0.5"], ["optimizer.adam_beta1"]),
        (["--optimizer.max_grad_norm=0"], ["--optimizer.max_grad_norm: expected a number or null more than 0, got 0"]),
        (["--optimizer.muon_lr=-1"], ["--optimizer.muon_lr: expected a number or null more than 0, got -1"]),
        (["--objective.huber_c=0"], ["--objective.huber_c: expected a number or null more than 0, got 0"]),
        (["--model.adapter.alpha=0"], ["--model.adapter.alpha: expected a number or null more than 0, got 0"]),
        (["--model.schedule.shift=0"], ["--model.schedule.shift: expected a number or null more than 0, got 0"]),
        (
            ["--model.schedule.beta_end=0"],
            ["--model.schedule.beta_end: expected a number or null more than 0 and at most 1, got 0"],
        ),
        (
            ["--train.seed=-1"],
            ["--train.seed: expected an integer at least 0 and at most 9223372036854775807, got -1"],
        ),
        (["--train.ema=[often]"], ["train.ema", "often"]),
        (["--train.ema=[0.9, 0.9]"], ["train.ema", "twice"]),
        (["--train.gradient_accumulation_steps=65"], ["gradient_accumulation_steps", "65"]),
        (["--optimizer.lr_scheduler=constant", "--optimizer.lr_warmup_steps=5"], ["optimizer.lr_warmup_steps"]),
    ],
)
def test_bad_settings_are_named_in_one_line(tmp_path: Path, overrides: list[str], named: list[str]) -> None:
    message = refusal(tmp_path, BASE, *overrides)
    for part in named:
        assert part in message, message


def test_messages_begin_with_what_gave_the_value(tmp_path: Path) -> None:
    file = str(tmp_path / "config.yaml")
    in_file = BASE + "optimizer: {learning_rate: fast}\n"
    told = 'expected a number at least 0, got "fast"'
    assert refusal(tmp_path, in_file, "--train.seed=1") == f"{file}: optimizer.learning_rate: {told}"
    assert refusal(tmp_path, BASE, "--optimizer.learning_rate=fast") == f"--optimizer.learning_rate: {told}"
    twice = ("--optimizer.learning_rate=1", "--optimizer.learning_rate=fast")
    assert refusal(tmp_path, BASE, *twice) == f"--optimizer.learning_rate: {told}"
    assert load(tmp_path, in_file, "--optimizer.learning_rate=1").optimizer.learning_rate == 1
    whole = "--model.schedule={kind: slow}"
    assert refusal(tmp_path, BASE, whole).startswith("--model.schedule: model.schedule.kind: expected one of linear")
    assert refusal(tmp_path, BASE, "--train.seed.x=5").startswith("--train.seed.x: train.seed: expected an integer")
    unknown = "--train.sede is not a setting; the nearest is train.seed"
    assert refusal(tmp_path, BASE, "--train.sede=1") == unknown
    word = "--model.textual_inversion.num_vectors=2"
    assert refusal(tmp_path, BASE, word).startswith(f"{file}: model.textual_inversion.placeholder_token is missing")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: {unet: {}}\ntrain: {output_dir: run}\n", "data.train_data_dir is missing"),
        ("train: {seed: 1, seed: 2}\n", "given twice"),
        ("train: [\n", "not valid YAML"),
        ("just text\n", "expected sections"),
        ("? [a]\n: b\n", "unhashable key"),
        ("a: &a [*a]\n", "config.yaml"),
        ("!!python/object/apply:os.system [true]\n", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, part: str) -> None:
    assert part in refusal(tmp_path, text)


def test_what_a_run_writes_is_not_what_it_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    for inside in ("images", "images/run", "./none/../images/run"):
        message = refusal(tmp_path, BASE, f"--train.output_dir={inside}")
        assert message.startswith(f"train.output_dir: {inside} lies in data.train_data_dir")
    prior = ("--data.class_prompt=a cat", "--data.class_data_dir=images/cats")
    assert "data.class_data_dir: images/cats lies in data.train_data_dir" in refusal(tmp_path, BASE, *prior)
    (tmp_path / "images/metadata.csv").write_text("file_name,text\n")  # which lists what is trained on
    assert load(tmp_path, BASE, "--train.output_dir=images/run").train.output_dir == "images/run"
    for outside in ("run", "images-run", "images/../run"):
        assert load(tmp_path, BASE, f"--train.output_dir={outside}").train.output_dir == outside


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config file cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(InputError, match="UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_parts_of_a_pretrained_model_are_not_configured(tmp_path: Path) -> None:
    text = BASE.replace("unet: {}", "pretrained: some/folder")
    assert load(tmp_path, text).model.pretrained == "some/folder"
    assert "model.pixel_mean" in refusal(tmp_path, text, "--model.pixel_mean=0.5")
    zero_snr = ("--model.schedule.zero_snr=true", "--model.schedule.prediction_type=v_prediction")
    assert load(tmp_path, text, *zero_snr).model.schedule.zero_snr
    assert load(tmp_path, text, "--model.train_text_encoder=true").model.train_text_encoder is True


def test_changed_names_what_a_run_cannot_be_resumed_with(tmp_path: Path) -> None:
    old = to_dict(load(tmp_path))
    free = to_dict(
        load(tmp_path, BASE, "--train.max_train_steps=9", "--train.output_dir=else", "--data.train_data_dir=b")
    )
    assert changed(old, free) == []
    other = to_dict(load(tmp_path, BASE, "--optimizer.learning_rate=0.5", "--model.unet.layers_per_block=3"))
    assert changed(old, other) == [
        ("model.unet", {}, {"layers_per_block": 3}),
        ("optimizer.learning_rate", 0.0001, 0.5),
    ]


def test_every_setting_is_explained() -> None:
    for item in settings():
        assert len(item.help) > 5, item.key
        if "null" in item.type.split():
            assert "null" in item.help or item.key == "model.unet", item.key
    lines = help_text().splitlines()
    assert len(lines) == len(settings())
    assert any(line.startswith("  --train.max_train_steps=1000  (an integer)") for line in lines)


def test_reading_settings_needs_no_torch() -> None:
    code = "import sys, training.config; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    begun = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(settings_module.__file__).parents[1]).returncode == 0
    assert time.perf_counter() - begun < 20
