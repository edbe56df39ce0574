"""Models of every family that is trained, beside the stock pipelines: SDXL, editing, classes, and single files."""

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_unet.codec import LatentCodec, PixelCodec
from diffusion_unet.conditioning import TextEncoder, size_ids
from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.pipeline import PixelTextToImagePipeline
from diffusion_unet.prompts import ClassLabels, DualTextEncoder
from diffusion_unet.random import Purpose, normal
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.single_file import write_single_file
from diffusion_unet.unet import UNet
from sampling import sample
from sampling.request import Request
from sampling.sampler import make_plan

PROMPTS = [tiny.PROMPT, "BLUE bag", ""]
NAMES = ("boot", "bag", "0")
LATENT = tiny.SIZE // 2


def unet(config: dict[str, Any], **changes: Any) -> UNet:
    given = {key: value for key, value in (config | {"sample_size": LATENT} | changes).items() if key[0] != "_"}
    return tiny.seeded(lambda: UNet(UNetConfig.from_diffusers(given)))


def stock_xl(folder: Path, *, zeros: bool = True) -> Path:
    """A folder that stock diffusers wrote. As in SDXL's own, the two tokenizers fill up with different tokens, and the
    text encoders have different activations."""
    given = {key: value for key, value in (tiny.XL | {"sample_size": LATENT}).items() if key[0] != "_"}
    network = tiny.seeded(lambda: diffusers.UNet2DConditionModel(**given))
    second = copy.deepcopy(tiny.tokenizer())
    second.pad_token = "!"
    parts = tiny.xl_parts() | {"tokenizer_2": second, "scheduler": tiny.ddim()}
    config = copy.deepcopy(parts["text_encoder_2"].config)
    config.hidden_act = "gelu"
    parts["text_encoder_2"] = tiny.seeded(lambda: transformers.CLIPTextModelWithProjection(config))
    pipe = diffusers.StableDiffusionXLPipeline(unet=network, force_zeros_for_empty_prompt=zeros, **parts)
    pipe.save_pretrained(folder)
    return folder


def whole(folder: Path) -> Any:
    """As anybody would load it, with diffusers alone."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_xl(tmp_path_factory.mktemp("xl") / "model")


@pytest.fixture(scope="module")
def xl(xl_folder: Path) -> DiffusionModel:
    return DiffusionModel.load(xl_folder)


@pytest.fixture(scope="module")
def sd() -> DiffusionModel:
    return latent_model(unet(tiny.SD))


def latent_model(network: UNet, text: Any = None) -> DiffusionModel:
    schedule = NoiseSchedule.from_config(dict(tiny.ddim().config))
    text = text or TextEncoder(tiny.tokenizer(), tiny.text_encoder())
    return DiffusionModel(network, schedule, text, LatentCodec(tiny.vae()))


def tensors(folder: Path) -> dict[str, Tensor]:
    parts = sorted(folder.rglob("*.safetensors"))
    return {f"{path.parent.name}/{key}": value for path in parts for key, value in load_file(path).items()}


# ---- SDXL: text ----------------------------------------------------------------------------------------------------


def test_both_encoders_say_what_stock_sdxl_hears(xl: DiffusionModel, xl_folder: Path) -> None:
    pipe = whole(xl_folder)
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS[:2], device="cpu", do_classifier_free_guidance=False)
        ours = xl.text.encode(PROMPTS[:2])
    assert torch.allclose(ours.context, context, atol=1e-6) and torch.allclose(ours.pooled, pooled, atol=1e-6)
    assert ours.context.shape == (2, tiny.LENGTH, tiny.CONTEXT_WIDTH) and ours.pooled.shape == (2, tiny.POOLED_WIDTH)
    assert (xl.text.width, xl.text.pooled_width, xl.text.max_length) == (tiny.CONTEXT_WIDTH, 16, tiny.LENGTH)
    assert pooled.abs().mean() > 0.01 and (context[0] - context[1]).abs().max() > 0.1
    ids, cut = xl.text.tokenize(["red " * 20, *PROMPTS])
    assert ids.shape == (4, 2, tiny.LENGTH) and cut == 1
    assert ids[3, 0, -1] == tiny.tokenizer().eos_token_id and ids[3, 1, -1] == tiny.tokenizer().get_vocab()["!"]
    with pytest.raises(InputError, match=f"the text encoder reads {tiny.LENGTH}: shorten"):
        xl.text.encode(["red " * 20])


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_what_stock_leads_away_from(zeros: bool, tmp_path: Path) -> None:
    folder = stock_xl(tmp_path / "model", zeros=zeros)
    with torch.no_grad():
        _, context, _, pooled = whole(folder).encode_prompt(PROMPTS[0], device="cpu")
        ours = DiffusionModel.load(folder).text.encode(["", PROMPTS[0]])
    assert torch.allclose(ours.context[:1], context, atol=1e-6) and torch.allclose(ours.pooled[:1], pooled, atol=1e-6)
    assert (not context.any()) == (not pooled.any()) == zeros and ours.context[1].any()


def test_what_nothing_reads_of_the_first_encoder_is_not_trained(xl_folder: Path) -> None:
    text = DualTextEncoder.load(xl_folder).requires_grad_()
    said = text.encode(PROMPTS)
    (said.context.square().sum() + said.pooled.square().sum()).backward()
    trained = {name for name, parameter in text.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in text.named_parameters() if parameter.grad is not None}
    assert "second.model.text_projection.weight" in trained
    assert {name.split(".layers.")[-1][0] for name in set(dict(text.named_parameters())) - trained} == {"1", "f"}
    assert not any(parameter.requires_grad for parameter in text.requires_grad_(False).parameters())


def test_encoders_that_are_not_a_pair(xl_folder: Path) -> None:
    first = TextEncoder.load(xl_folder)
    second = DualTextEncoder.load(xl_folder).second
    with pytest.raises(InputError, match="no text_projection"):
        DualTextEncoder(first, first)
    first.max_length = 8
    with pytest.raises(InputError, match="read 8 and 12 tokens"):
        DualTextEncoder(first, second)


def test_fingerprints_of_tokenizers(xl: DiffusionModel, sd: DiffusionModel, xl_folder: Path) -> None:
    plain = DualTextEncoder(xl.text.first, xl.text.second, zeros_for_empty=False)
    swapped = DualTextEncoder(xl.text.first, TextEncoder(xl.text.first.tokenizer, xl.text.second.model))
    every = [text.fingerprint() for text in (xl.text, sd.text, plain, swapped, ClassLabels(NAMES), ClassLabels(["a"]))]
    assert len(set(every)) == 6 and all(len(value) == 64 for value in every)
    assert DualTextEncoder.load(xl_folder).fingerprint() == every[0]
    assert list(xl.text.encoders) == ["text_encoder", "text_encoder_2"] and list(sd.text.encoders) == ["text_encoder"]


def test_sizes_are_in_sdxls_order() -> None:
    pipe: Any = diffusers.StableDiffusionXLPipeline
    ids = pipe._get_add_time_ids(_Unchecked, (10, 20), (3, 4), (50, 60), torch.float32, 16)
    assert torch.equal(size_ids((10, 20), (3, 4), (50, 60)), ids[0]) and ids.shape == (1, 6)


class _Unchecked:
    """What `_get_add_time_ids` asks of its pipeline: that six numbers fit."""

    class unet:
        class config:
            addition_time_embed_dim = 0

        class add_embedding:
            linear_1 = nn.Linear(16, 1)


# ---- SDXL: pictures and files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance_scale", "size"), [(1.0, None), (3.0, (8, 24))])
def test_sdxl_draws_what_the_stock_pipeline_draws(
    xl: DiffusionModel, xl_folder: Path, guidance_scale: float, size: tuple[int, int] | None
) -> None:
    height, width = size or (tiny.SIZE, tiny.SIZE)
    settings: dict[str, Any] = {"steps": 4, "guidance_scale": guidance_scale, "size": size, "spacing": "leading"}
    ours = sample(xl, PROMPTS[:2], seeds=[7], solver="ddim", **settings)
    latents = normal(7, Purpose.PICTURE, 0, (4, height // 2, width // 2)).expand(2, -1, -1, -1)
    theirs = whole(xl_folder)(
        PROMPTS[:2], height=height, width=width, latents=latents, num_inference_steps=4,
        guidance_scale=guidance_scale, output_type="np",
    ).images  # fmt: skip
    assert theirs.shape == (2, height, width, 3) and np.ptp(theirs) > 0.2
    assert np.abs(np.stack([np.asarray(image) for image in ours]) / 255 - theirs).max() < 1.01 / 255


def test_the_network_is_told_the_size_that_is_drawn(xl: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    precompute = xl.unet.precompute

    def watch(*args: Any, **given: Any) -> Any:
        seen.append(given["time_ids"])
        return precompute(*args, **given)

    monkeypatch.setattr(xl.unet, "precompute", watch)
    sample(xl, PROMPTS[:2], steps=1, size=(12, 20))
    assert [row.tolist() for row in seen] == [[[12, 20, 0, 0, 12, 20]]] * 3  # each text by itself


def test_sdxl_returns_from_its_folder(xl: DiffusionModel, xl_folder: Path, tmp_path: Path) -> None:
    before = json.loads((xl_folder / "model_index.json").read_text())
    folder = xl.save(tmp_path / "model")
    written, stock = tensors(folder), tensors(xl_folder)
    # transformers 5 drops a prefix in memory, and writes files without it; those in circulation have it
    stock = {key.replace("text_encoder/", "text_encoder/text_model.").replace("text_model.text_model", "text_model"):
             value for key, value in stock.items()}  # fmt: skip
    assert written.keys() == stock.keys() and all(torch.equal(written[key], stock[key]) for key in stock)
    assert "text_encoder_2/text_projection.weight" in written
    index = json.loads((folder / "model_index.json").read_text())
    names = {key: value for key, value in before.items() if isinstance(value, list) or key == "_class_name"}
    assert index.items() >= (names | {"force_zeros_for_empty_prompt": True}).items()
    assert index["add_watermarker"] is None
    again = DiffusionModel.load(folder)
    assert again.fingerprint() == xl.fingerprint() and again.task == "text-to-image"
    pipe, own = whole(folder), whole(xl_folder)
    assert type(pipe) is diffusers.StableDiffusionXLPipeline and pipe.tokenizer_2.pad_token == "!"
    call: dict[str, Any] = {"prompt": PROMPTS[0], "height": 16, "width": 16, "num_inference_steps": 2}
    call |= {"output_type": "np"}
    drawn = [each(**call, generator=torch.Generator().manual_seed(0)).images for each in (pipe, own)]
    assert np.array_equal(*drawn)
    half = DiffusionModel.load(xl.save(tmp_path / "half", dtype=torch.float16, variant="fp16"), variant="fp16")
    assert {parameter.dtype for parameter in half.text.parameters()} == {torch.float16}


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        DiffusionModel.load(folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2 is"),
        ({"text_encoder": [None, None]}, "text_encoder is"),
        ({"tokenizer_2": ["evil", "CLIPTokenizer"]}, "tokenizer_2 is"),
        ({"force_zeros_for_empty_prompt": "yes"}, "force_zeros_for_empty_prompt is 'yes'"),
        ({"_class_name": "StableDiffusionXLInstructPix2PixPipeline", "is_cosxl_edit": True}, "is_cosxl_edit"),
        ({"_class_name": "StableDiffusionPipeline"}, "pooled text of width 16|context of width"),
    ],
)
def test_sdxl_folders_that_do_not_fit(xl_folder: Path, tmp_path: Path, changes: dict[str, object], match: str) -> None:
    folder = Path(shutil.copytree(xl_folder, tmp_path / "copy"))
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(folder, match)
    (folder / "text_encoder_2" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    path.write_bytes((xl_folder / "model_index.json").read_bytes())
    refused(folder, "a CLIPTextModelWithProjection is needed")


# ---- inpainting and editing ----------------------------------------------------------------------------------------

EDITING = {
    (9, False): diffusers.StableDiffusionInpaintPipeline,
    (8, False): diffusers.StableDiffusionInstructPix2PixPipeline,
    (9, True): diffusers.StableDiffusionXLInpaintPipeline,
    (8, True): diffusers.StableDiffusionXLInstructPix2PixPipeline,
}


@pytest.mark.parametrize(("channels", "is_xl"), EDITING)
def test_models_that_start_from_a_picture_are_the_stock_pipelines(
    channels: int, is_xl: bool, xl: DiffusionModel, tmp_path: Path
) -> None:
    model = latent_model(unet(tiny.XL if is_xl else tiny.SD, in_channels=channels), xl.text if is_xl else None)
    folder = model.save(tmp_path / "model")
    loaded = DiffusionModel.load(folder)
    task = {9: "inpaint", 8: "instruct-pix2pix"}[channels]
    assert loaded.task == model.task == task and loaded.fingerprint() == model.fingerprint()
    pipe = whole(folder)
    assert type(pipe) is EDITING[channels, is_xl]
    call: dict[str, Any] = {"image": tiny.picture(0), "num_inference_steps": 2, "output_type": "np"}
    call |= {"mask_image": tiny.mask()} if channels == 9 else {"image_guidance_scale": 1.5}
    drawn = pipe(tiny.PROMPT, height=16, width=16, generator=torch.Generator().manual_seed(0), **call).images
    assert drawn.shape == (1, 16, 16, 3) and np.isfinite(drawn).all() and np.ptp(drawn) > 0.05
    with pytest.raises(InputError, match=f"takes {channels} channels and predicts 4: {task} needs a picture"):
        sample(loaded, PROMPTS[:1])


def test_other_inputs_are_no_task(tmp_path: Path) -> None:
    depth = latent_model(unet(tiny.SD, in_channels=5))
    with pytest.raises(InputError, match="takes 5 channels and predicts 4: that is neither"):
        depth.save(tmp_path / "model")
    pixels = DiffusionModel(bare(in_channels=7), NoiseSchedule.linear(), None, PixelCodec(3))
    with pytest.raises(InputError, match="on pixels cannot be saved for inpaint"):
        pixels.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ---- latents from nothing ------------------------------------------------------------------------------------------


def test_a_latent_model_of_its_own_words_is_a_stock_pipeline(
    sd: DiffusionModel, xl: DiffusionModel, tmp_path: Path
) -> None:
    assert sd.task == "text-to-image"
    pipe = whole(sd.save(tmp_path / "model"))
    assert type(pipe) is diffusers.StableDiffusionPipeline
    ours = np.asarray(sample(sd, tiny.PROMPT, seeds=[3], steps=3, solver="ddim", spacing="leading")[0]) / 255
    latents = normal(3, Purpose.PICTURE, 0, (4, LATENT, LATENT))
    call: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    theirs = pipe(tiny.PROMPT, height=16, width=16, latents=latents, **call).images[0]
    assert np.abs(ours - theirs).max() < 1.01 / 255 and np.ptp(theirs) > 0.2
    with pytest.raises(InputError, match="latents is drawn from text alone"):
        DiffusionModel(bare(in_channels=4, out_channels=4), sd.schedule, None, sd.codec)
    with pytest.raises(InputError, match="takes no pooled text, and there is a text encoder that gives one of 16"):
        DiffusionModel(sd.unet, sd.schedule, xl.text, sd.codec)
    with pytest.raises(InputError, match="takes a pooled text of width 16 and six sizes, and there is no text encoder"):
        DiffusionModel(xl.unet, xl.schedule, sd.text, xl.codec)


# ---- classes -------------------------------------------------------------------------------------------------------


def bare(**changes: Any) -> UNet:
    """Without cross-attention."""
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    sizes = {"in_channels": 3, "out_channels": 3, "sample_size": 8, "cross_attention_dim": None}
    config = tiny.SD | blocks | sizes | {"mid_block_type": "UNetMidBlock2D", "attention_head_dim": 2}
    return unet(config, **({"sample_size": 8} | changes))


@pytest.fixture(scope="module")
def classes() -> DiffusionModel:
    network = bare(num_class_embeds=len(NAMES) + 1)
    with torch.no_grad():
        network.class_embedding.weight.mul_(5)
    return DiffusionModel(network, NoiseSchedule.scaled_linear(), ClassLabels(NAMES), PixelCodec(3))


def test_names_are_class_numbers_and_nothing_is_the_last() -> None:
    text = ClassLabels(NAMES)
    ids, cut = text.tokenize(["bag", "", "0", "boot"])
    assert ids.tolist() == [[1], [3], [2], [0]] and cut == 0 and ids.dtype == torch.int64
    assert text.encode(["0", ""]).class_labels.tolist() == [2, 3] and text.encode("bag").class_labels.tolist() == [1]
    assert text(ids).context is None and text.width is None and text.encoders == {} and not list(text.parameters())
    assert text.tokenize([])[0].shape == (0, 1)
    with pytest.raises(InputError, match="'boots' is none of the 3 classes; 'boot' is"):
        text.tokenize(["boots"])
    for names, match in (("ab", "'ab'"), ([], "a text for each"), (["a", ""], "a text"), (["a", "b", "a"], "'a' is"),
                         (["a", 3], "a text for each")):  # fmt: skip
        with pytest.raises(InputError, match=match):
            ClassLabels(names)


def test_a_class_is_drawn_as_its_number_is_by_the_network(classes: DiffusionModel) -> None:
    settings: dict[str, Any] = {"steps": 3, "guidance_scale": 3.0, "solver": "ddim", "seeds": [1]}
    images = np.stack([np.asarray(image) for image in sample(classes, ["0", "boot"], **settings)])
    plan = make_plan(classes, Request(prompts=["boot"], **settings))
    x = normal(1, Purpose.PICTURE, 0, (3, 8, 8)) * plan.start
    levels = [*plan.course.sigma.tolist(), 0.0]
    for sigma, after in itertools.pairwise(levels):
        with torch.no_grad():
            towards, away = (_denoised(classes, x, sigma, label) for label in (0, 3))
        clean = away + 3 * (towards - away)
        x = clean + after / sigma * (x - clean)
    expected = classes.codec.decode(x).numpy()[0].astype(int)
    assert np.abs(images[1] - expected).max() <= 1 and np.abs(images[0] - expected).max() > 5
    with pytest.raises(InputError, match="'shoe' is none of the 3 classes"):
        sample(classes, ["shoe"])
    with pytest.raises(InputError, match="no prompt"):
        sample(classes)


def _denoised(model: DiffusionModel, x: Tensor, sigma: float, label: int) -> Tensor:
    """Epsilon-prediction written out, from stock's own network with the same weights."""
    stock, alpha = diffusers.UNet2DConditionModel(**model.unet.config.to_diffusers()), 1 / (1 + sigma**2) ** 0.5
    stock.load_state_dict(model.unet.state_dict())
    t = float(model.schedule.timestep(sigma))
    return x - sigma * stock.eval()(x * alpha, t, None, class_labels=torch.tensor([label])).sample


def test_classes_return_from_their_folder_and_the_pipeline_draws_them(classes: DiffusionModel, tmp_path: Path) -> None:
    folder = classes.save(tmp_path / "model")
    assert json.loads((folder / "model_index.json").read_text())["class_names"] == {"0": "boot", "1": "bag", "2": "0"}
    loaded = DiffusionModel.load(folder)
    assert loaded.class_names == NAMES and loaded.fingerprint() == classes.fingerprint()
    other = DiffusionModel(classes.unet, classes.schedule, ClassLabels(["a", "b", "c"]), classes.codec)
    assert other.fingerprint() != classes.fingerprint()
    pipe = PixelTextToImagePipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "again")
    pipe = PixelTextToImagePipeline.from_pretrained(tmp_path / "again")
    assert DiffusionModel.load(tmp_path / "again").class_names == NAMES
    pipe.set_progress_bar_config(disable=True)
    latents = normal(1, Purpose.PICTURE, 0, (3, 8, 8)).expand(2, -1, -1, -1)
    for scale in (1.0, 3.0):
        call: dict[str, Any] = {"guidance_scale": scale, "negative_prompt": "bag"}
        theirs = pipe(["0", "boot"], num_inference_steps=3, latents=latents, output_type="np", **call).images
        ours = sample(classes, ["0", "boot"], seeds=[1], steps=3, solver="ddim", **call)
        assert np.abs(np.stack([np.asarray(image) for image in ours]) - theirs.astype(int)).max() <= 1
        assert np.abs(theirs[0].astype(int) - theirs[1]).max() > 5
    with pytest.raises(InputError, match="'shoe' is none of the 3 classes"):
        pipe("shoe")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["boot", "bag", "0"], "class_names is"),
        ({"0": "boot", "2": "bag", "1": "0"}, "class_names is"),
        ({"0": "boot", "1": "bag"}, "has 4 classes, and there are 2 class names"),
        ({"0": "boot", "1": "bag", "2": 0}, "a text for each class"),
        (None, "has 4 classes, and there are no class names"),
    ],
)
def test_class_names_that_do_not_fit(classes: DiffusionModel, tmp_path: Path, names: Any, match: str) -> None:
    folder = classes.save(tmp_path / "model")
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": names}))
    refused(folder, match)
    with pytest.raises(InputError, match="has no classes, and there are 3 class names"):
        DiffusionModel(bare(), classes.schedule, classes.text, classes.codec)


# ---- single files --------------------------------------------------------------------------------------------------


def single(folder: Path, path: Path) -> Path:
    """The file, and the folder without weights."""
    write_single_file(folder, path)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return path


@pytest.mark.parametrize("family", ["sd", "xl", "inpaint"])
def test_a_single_file_is_the_model_of_its_folder(
    family: str, sd: DiffusionModel, xl: DiffusionModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edits = latent_model(unet(tiny.SD, in_channels=9))
    model = {"sd": sd, "xl": xl, "inpaint": edits}[family]
    folder = model.save(tmp_path / "model")
    loaded = DiffusionModel.load(single(folder, tmp_path / "model.safetensors"), config=folder)
    assert loaded.fingerprint() == model.fingerprint() and loaded.task == model.task
    assert capfd.readouterr() == ("", "")


def test_a_single_file_in_half_precision(sd: DiffusionModel, tmp_path: Path) -> None:
    folder, path = sd.save(tmp_path / "model"), tmp_path / "half.safetensors"
    write_single_file(folder, path, dtype=torch.float16)
    for dtype in (None, torch.float32):
        loaded = DiffusionModel.load(path, config=folder, dtype=dtype, device="cpu")
        parts = (loaded.unet, loaded.text, loaded.codec.vae)
        assert {parameter.dtype for part in parts for parameter in part.parameters()} == {dtype or torch.float16}
    assert torch.equal(loaded.unet.conv_in.weight, sd.unet.conv_in.weight.half().float())


def test_single_files_that_do_not_fit(sd: DiffusionModel, xl_folder: Path, tmp_path: Path) -> None:
    folder = sd.save(tmp_path / "model")
    path = single(folder, tmp_path / "model.safetensors")
    refused(path, "name a folder with the configs")
    refused(tmp_path / "none.safetensors", "there is no such file", config=folder)
    refused(path, "is no model: it holds no model_index.json", config=tmp_path)
    refused(path, r"model\.safetensors", config=xl_folder)
    held = load_file(path)
    for key in ("model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias", "cond_stage_model.transformer"
                ".text_model.final_layer_norm.bias", "model.diffusion_model.input_blocks.0.0.weight"):  # fmt: skip
        save_file({name: value for name, value in held.items() if name != key}, tmp_path / "less.safetensors")
        refused(tmp_path / "less.safetensors", r"less\.safetensors", config=folder)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    refused(tmp_path / "cut.safetensors", "damaged", config=folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["evil", "Evil"], "extra": ["e", "E"]}))
    assert DiffusionModel.load(path, config=folder).fingerprint() == sd.fingerprint()


def test_transformers_own_files_are_read(xl: DiffusionModel, tmp_path: Path) -> None:
    """As transformers itself writes the second encoder, whatever its version does to the keys."""
    model = xl.text.second.model
    assert isinstance(model, transformers.CLIPTextModelWithProjection)
    folder = xl.save(tmp_path / "model")
    model.save_pretrained(folder / "text_encoder_2")
    xl.text.first.model.save_pretrained(folder / "text_encoder")
    assert DiffusionModel.load(folder).fingerprint() == xl.fingerprint()
