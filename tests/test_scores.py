"""Scores beside direct computations: FID, KID, CLIP score, prompt accuracy; and the networks that they look with."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_unet.clip import save_tokenizer
from diffusion_unet.conditioning import train_tokenizer
from diffusion_unet.errors import InputError
from training import fashion, scores
from training.features import Clip, Preparation, classifier_network, feature_network

pytest.importorskip("torchmetrics")


def features(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """With a covariance that is not diagonal."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + shift


def pictures(count: int, size: tuple[int, int] = (9, 7), seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)) for _ in range(count)]


# --- FID and KID


def closed_form(x: np.ndarray, y: np.ndarray) -> float:
    """With tr (S S')^(1/2) = tr (S^(1/2) S' S^(1/2))^(1/2), by eigenvalues of symmetric matrices."""
    s, t = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross)


def test_fid_is_the_distance_of_two_normal_distributions() -> None:
    x, y = features(200, 6, seed=1), features(150, 6, seed=2, shift=0.5)
    assert scores.fid(x, y) == pytest.approx(closed_form(x.numpy(), y.numpy()), rel=1e-9)
    assert scores.fid(x, x) == pytest.approx(0, abs=1e-6)
    assert scores.fid(x.float(), y.float()) == pytest.approx(scores.fid(x, y), rel=1e-5)


def direct_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def among(z: np.ndarray) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
        return sum(pairs) / len(pairs)

    return among(x) + among(y) - 2 * float(np.mean([kernel(a, b) for a in x for b in y]))


def test_kid_is_the_unbiased_mmd_of_all_pictures_where_they_are_few() -> None:
    x, y = features(40, 5, seed=1), features(40, 5, seed=2, shift=0.3)
    mean, std = scores.kid(x, y)
    assert mean == pytest.approx(direct_mmd(x.numpy(), y.numpy()), rel=1e-9) and std == 0


def test_kid_of_subsets_comes_near_that_of_all_and_is_the_same_at_every_call() -> None:
    x, y = features(90, 4, seed=1), features(30, 4, seed=1, shift=1.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mean, std = scores.kid(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert scores.kid(x, y) == (mean, std) and std > 0
    assert mean == pytest.approx(direct_mmd(x.numpy(), y.numpy()), abs=4 * std)


def test_a_score_says_what_it_is_from() -> None:
    seen: list[list[int]] = []

    def look(images: list[Image.Image]) -> Tensor:
        seen.append([len(images)])
        return torch.stack([torch.from_numpy(np.asarray(image)[:2].reshape(-1).astype(np.float32)) for image in images])

    real, drawn = pictures(70, (3, 2), seed=1), pictures(80, (3, 2), seed=2)
    asked: list[tuple[str, int]] = []

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        asked.extend(zip(prompts, seeds, strict=True))
        return [drawn[seed] for seed in seeds]

    prompts = [f"picture {number}" for number in range(80)]
    result = scores.score(draw, prompts, range(80), iter(real), features=look)
    assert asked == list(zip(prompts, range(80), strict=True)) and max(seen) == [scores.CHUNK]
    assert (result["images"], result["references"], result["feature_dimensions"]) == (80, 70, 18)
    assert result["fid"] == pytest.approx(scores.fid(look(real), look(drawn)), rel=1e-9)
    assert (result["kid"], result["kid_std"]) == scores.kid(look(real), look(drawn))
    assert "biased" in result["fid_note"] and "dimensions" not in result["fid_note"] and "70" in result["kid_note"]
    few = scores.score(draw, prompts[:18], range(18), real, features=look)
    assert "18 pictures for 18 dimensions" in few["fid_note"]
    assert json.loads(json.dumps(few)) == few


def test_what_cannot_be_scored_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return pictures(len(prompts))

    look = feature_network("fashion")
    with pytest.raises(InputError, match="nothing to score with"):
        scores.score(draw, ["a"], [0])
    with pytest.raises(InputError, match="2 drawn, 0 for reference"):
        scores.score(draw, ["a", "b"], [0, 1], features=look)
    with pytest.raises(InputError, match="needs a class for every prompt"):
        scores.score(draw, ["a"], [0], classifier=look)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(InputError, match=r"pip install 'diffusion-unet\[scores\]'"):
        scores.score(lambda *_: pytest.fail("drawn before it was refused"), ["a"], [0], pictures(2), features=look)


# --- the classifier of the embedded photographs, and networks of the user's own


def test_the_shipped_classifier_looks_at_pictures_of_any_size_and_mode() -> None:
    classifier, real = fashion.Classifier.load(), fashion.load()
    images = [real.image(0), real.image(1).convert("RGB"), real.image(2).resize((40, 40))]
    expected = torch.cat([classifier(torch.from_numpy(np.array(image))[None]) for image in images])
    torch.testing.assert_close(classifier_network("fashion")(images), expected, atol=1e-4, rtol=1e-4)
    seen = feature_network("fashion")(images)
    assert seen.shape == (3, 720)
    torch.testing.assert_close(classifier.head(seen), expected, atol=1e-4, rtol=1e-4)


def test_prompt_accuracy_of_real_photographs() -> None:
    real = fashion.load()
    labels = real.labels[:100].tolist()

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [real.image(seed) for seed in seeds]

    result = scores.score(draw, ["it"] * 100, range(100), classifier=classifier_network("fashion"), labels=labels)
    right = fashion.Classifier.load()(torch.tensor(real.images[:100])).argmax(1) == torch.tensor(labels)
    assert result == {"images": 100, "prompt_accuracy": right.double().mean().item()} and right.double().mean() > 0.8


def brightness(images: list[Image.Image]) -> Tensor:
    return torch.tensor([[float(np.asarray(image).mean())] for image in images])


def no_rows(images: list[Image.Image]) -> Tensor:
    return torch.zeros(1, 3)


def test_a_network_of_the_users_own() -> None:
    images = pictures(4)
    assert torch.equal(feature_network(f"{__name__}:brightness")(images), brightness(images))
    with pytest.raises(InputError, match=r"--features: .*no_rows gave a tensor \[1, 3\] for 4 pictures"):
        feature_network(f"{__name__}:no_rows")(images)
    with pytest.raises(InputError, match=r"--features: inception is no folder"):
        feature_network("inception")
    with pytest.raises(InputError, match=r"--classifier: .*cannot be called"):
        classifier_network("training.scores:CHUNK")


# --- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["a red square", "a blue circle"], 530, 12)
    save_tokenizer(tokenizer, folder)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**common, **text, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id},
        vision_config={**common, "image_size": 20, "patch_size": 10},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(config)
        for parameter in model.parameters():  # as drawn by transformers, all texts are nearly alike
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 20, "width": 20},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def stock_pixels(folder: Path, images: list[Image.Image]) -> Tensor:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels: Tensor = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    return pixels


def test_pictures_are_prepared_as_by_the_stock_processor(clip_folder: Path) -> None:
    images = [*pictures(1, (31, 47)), *pictures(1, (64, 23), seed=1), *pictures(1, (8, 11), seed=2)]
    images.append(images[0].convert("L"))
    preparation = Preparation.read(clip_folder / "preprocessor_config.json")
    ours = torch.stack([preparation(image) for image in images])
    torch.testing.assert_close(ours, stock_pixels(clip_folder, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 24},
        {"size": {"height": 26, "width": 22}, "resample": 2},
        {"do_normalize": False},
        {"do_center_crop": False, "size": {"height": 20, "width": 22}},
        {"do_rescale": False},
    ],
)
def test_other_preparations_as_by_the_stock_processor(
    change: dict[str, Any], clip_folder: Path, tmp_path: Path
) -> None:
    settings = json.loads((clip_folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, **change}))
    image = pictures(1, (31, 47))
    ours = Preparation.read(tmp_path / "preprocessor_config.json")(image[0])
    torch.testing.assert_close(ours, stock_pixels(tmp_path, image)[0], atol=1e-4, rtol=0)


def test_clip_score_beside_the_stock_model(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    prompts = ["a red square", "a blue circle", "", "red circle"]
    images = pictures(4, (24, 30))
    result = scores.score(lambda _, seeds: [images[s] for s in seeds], prompts, range(4), clip=Clip.load(clip_folder))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        answer = model(pixel_values=stock_pixels(clip_folder, images), **tokens)
        cosines = (answer.logits_per_image / model.logit_scale.exp()).diagonal().double()
    assert cosines.min() < 0 < cosines.max(), "the cut at zero is to be seen"
    assert result["clip_score"] == pytest.approx(float((100 * cosines).clamp(min=0).mean()), rel=1e-4)
    assert (result["images"], result["prompts_cut"]) == (4, 0)


def test_a_long_prompt_is_cut_and_counted(clip_folder: Path) -> None:
    prompts = ["a red square " * 20, "a"]
    images = pictures(2)
    result = scores.score(lambda *_: images, prompts, [0, 1], clip=Clip.load(clip_folder))
    assert result["prompts_cut"] == 1


def test_clip_as_feature_network(clip_folder: Path) -> None:
    from transformers import CLIPModel

    images = pictures(5, (24, 30))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=stock_pixels(clip_folder, images))
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(feature_network(str(clip_folder))(images), expected, atol=1e-4, rtol=1e-4)


def test_a_folder_that_is_no_clip_model_is_one_line(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        Clip.load(tmp_path)
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"visual_projection\.weight is missing"):
        Clip.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged, or no safetensors file"):
        Clip.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "clip", "text_config": {"num_attention_heads": 0}}')
    with pytest.raises(InputError, match="num_attention_heads is 0, and must be a whole number"):
        Clip.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(InputError, match="type 'siglip'"):
        Clip.load(tmp_path)


@pytest.mark.parametrize("change", [{"size": None}, {"image_mean": "grey"}, {"resample": 99}, {"crop_size": 99}])
def test_a_preparation_that_cannot_be_is_one_line(change: dict[str, Any], clip_folder: Path, tmp_path: Path) -> None:
    settings = json.loads((clip_folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(InputError, match="is not how a CLIP model's pictures are prepared"):
        Preparation.read(tmp_path / "preprocessor_config.json")


# --- prompts


def test_prompts_with_and_without_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a coat\n\n  a red bag\n")
    assert scores.read_prompts(tmp_path / "a.txt") == (["a coat", "  a red bag"], None)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a coat", "label": 4}\n{"prompt": "a bag", "label": 8}\n')
    assert scores.read_prompts(tmp_path / "a.jsonl") == (["a coat", "a bag"], [4, 8])
    (tmp_path / "b.jsonl").write_text('{"prompt": "a coat"}\n')
    assert scores.read_prompts(tmp_path / "b.jsonl") == (["a coat"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a", "label": 1}\n{"prompt": "b"}', "1 of 2 prompts have no label"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2: prompt is 3, and must be a text"),
        ('{"prompt": "a", "label": true}', "line 1: label is True, and must be a whole number"),
        ('{"prompt": "a", "seed": 1}', "line 1: 'seed' is not known here: prompt, label are"),
        ("a coat", "line 1: is no JSON"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        scores.read_prompts(tmp_path / "a.jsonl")
