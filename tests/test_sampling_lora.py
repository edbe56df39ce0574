"""LoRA and DoRA files in the weights of a model, beside diffusers' own pipelines on the same weights."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_adapters import RGB, RGB_XL, assert_same, predict, read, shaken, stock_pipeline, stock_xl_pipeline
from tiny_adapters import tiny as tiny_model
from tiny_adapters import tiny_xl as tiny_xl_model
from torch import Tensor, nn

from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from sampling.adapters import AdaptedModel, Lora, with_adapters
from training.adapters import LORA_FILE, add_lora, save_lora
from training.config import AdapterConfig

# peft warns of every adapter after the first, which is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

# Without out_proj diffusers does not see the text encoder's part.
TARGETS = (
    "to_q",
    "attn2.to_k",
    "to_out.0",
    "ff.net.2",
    "proj_in",
    "conv1",
    "time_emb_proj",
    "q_proj",
    "fc1",
    "out_proj",
)


def trained(folder: Path, seed: int, *, xl: bool = False, layout: Any = "diffusers", **config: Any) -> DiffusionModel:
    """A model with a trained adapter, which is saved in `folder` too."""
    model: DiffusionModel = tiny_xl_model() if xl else tiny_model()
    add_lora(model, AdapterConfig(**{"rank": 2, "target_modules": TARGETS, **config}), text=True, seed=seed)
    assert model.text is not None
    shaken(model.unet, model.text)
    save_lora(model, folder, layout=layout)
    return model


def assert_equal_models(model: DiffusionModel, unet: nn.Module, *texts: nn.Module) -> None:
    config = RGB if len(texts) == 1 else RGB_XL
    assert_same(predict(model.unet, config), predict(unet, config))
    assert model.text is not None
    for encoder, text in zip(model.text.encoders.values(), texts, strict=True):
        assert_same(read(encoder.model), read(text))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_file_from_export_predicts_what_was_trained(layout: str, kind: str, tmp_path: Path) -> None:
    model = trained(tmp_path, 1, layout=layout, kind=kind, alpha=3.0)
    assert model.text is not None
    text = model.text.encoders["text_encoder"].model
    plain = tiny_model()
    adapted = with_adapters(plain, loras=[Lora(tmp_path / LORA_FILE)])
    assert_equal_models(adapted, model.unet, text)
    assert (predict(adapted.unet) - predict(plain.unet)).abs().max() > 1e-3


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "xl"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_several_files_are_mixed_as_in_the_stock_pipeline(layout: str, xl: bool, tmp_path: Path) -> None:
    scales = {"one": 0.7, "two": -0.4}
    for seed, name in enumerate(scales):
        trained(tmp_path / name, seed, xl=xl, layout=layout, alpha=5.0, rank=seed + 1)
    pipe = stock_xl_pipeline() if xl else stock_pipeline()
    for name in scales:
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(list(scales), list(scales.values()))
    plain = tiny_xl_model() if xl else tiny_model()
    adapted = with_adapters(plain, loras=[(tmp_path / name, scale) for name, scale in scales.items()])
    texts = [pipe.text_encoder, pipe.text_encoder_2] if xl else [pipe.text_encoder]
    assert_equal_models(adapted, pipe.unet, *texts)


def test_doras_are_mixed_as_in_the_stock_pipeline(tmp_path: Path) -> None:
    pipe = stock_pipeline()
    for seed, name in enumerate(["one", "two"]):
        trained(tmp_path / name, seed, kind="dora", alpha=3.0)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.6, 1.3])
    adapted = with_adapters(tiny_model(), loras=[(tmp_path / "one", 0.6), (tmp_path / "two", 1.3)])
    assert_equal_models(adapted, pipe.unet, pipe.text_encoder)


@pytest.mark.parametrize("spelling", ["old", "alphas", "root"])
def test_other_spellings_of_diffusers(spelling: str, tmp_path: Path) -> None:
    """The oldest, and what only peft's settings in the header say."""
    pipe, file = stock_pipeline(), tmp_path / LORA_FILE
    if spelling == "old":
        name, g = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor", torch.Generator().manual_seed(0)
        text, width = "text_encoder.text_model.encoder.layers.0.self_attn", tiny.CONTEXT_WIDTH
        sizes = {f"unet.{name}.to_{part}_lora": (16, width if part in "kv" else 16) for part in ("q", "k", "v", "out")}
        sizes |= {f"{text}.to_{part}_lora": (width, width) for part in ("q", "k", "v", "out")}
        tensors = {f"{layer}.down.weight": torch.randn(2, width, generator=g) for layer, (_, width) in sizes.items()}
        tensors |= {f"{layer}.up.weight": torch.randn(out, 2, generator=g) / 4 for layer, (out, _) in sizes.items()}
        save_file(tensors, file)
    else:
        more: dict[str, Any] = {"use_rslora": True} if spelling == "root" else {"alpha_pattern": {"attn1.to_q": 7}}
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"], init_lora_weights=False, **more)
        trained_pipe = stock_pipeline()
        torch.manual_seed(0)
        trained_pipe.unet.add_adapter(config)
        layers = diffusers.utils.convert_state_dict_to_diffusers
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=layers(get_peft_model_state_dict(trained_pipe.unet)),
            unet_lora_adapter_metadata=trained_pipe.unet.peft_config["default"].to_dict(),
        )
    pipe.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    adapted = with_adapters(tiny_model(), loras=[(file, 1.0)])
    assert_equal_models(adapted, pipe.unet, pipe.text_encoder)
    assert (predict(adapted.unet) - predict(tiny_model().unet)).abs().max() > 1e-3


def test_the_given_model_is_left_as_it_is_and_shares_what_is_not_changed(tmp_path: Path) -> None:
    trained(tmp_path, 1, target_modules=("to_q", "q_proj"))
    model = tiny_model()
    before, hash_before = predict(model.unet), model.fingerprint()
    seen: list[Tensor] = []
    go_on = threading.Event()

    def keep_drawing() -> None:
        while not go_on.is_set() or len(seen) < 5:
            seen.append(predict(model.unet))

    thread = threading.Thread(target=keep_drawing)
    thread.start()
    adapted = with_adapters(model, loras=[(tmp_path, 1.0)])
    go_on.set()
    thread.join()
    assert all(torch.equal(prediction, before) for prediction in seen)
    assert model.fingerprint() == hash_before != adapted.fingerprint()
    assert isinstance(adapted, AdaptedModel) and adapted.base is model
    state = model.unet.state_dict()
    for key, weight in adapted.unet.state_dict().items():
        assert (weight.data_ptr() == state[key].data_ptr()) == (not key.endswith("to_q.weight")), key
    assert with_adapters(model) is model


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    trained(tmp_path, 1, target_modules=("to_q",))
    half = with_adapters(tiny_model().to(dtype=torch.bfloat16), loras=[(tmp_path, 1.0)])
    whole = with_adapters(
        tiny_model().to(dtype=torch.bfloat16).to(dtype=torch.float32), loras=[(tmp_path, 1.0)]
    ).unet.state_dict()
    for key, weight in half.unet.state_dict().items():
        assert torch.equal(weight, whole[key].bfloat16()), key


# --- bad input ----------------------------------------------------------------------------------------------------


def _lora_of(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    save_file(tensors, path / "bad.safetensors")
    return {"loras": [(path / "bad.safetensors", 1.0)]}


def _pair(layer: str, width: int = 16, out: int = 16) -> dict[str, Tensor]:
    return {f"{layer}.lora_A.weight": torch.zeros(2, width), f"{layer}.lora_B.weight": torch.zeros(out, 2)}


def _pickled(path: Path) -> dict[str, Any]:
    (path / "bad.ckpt").write_bytes(b"\x80\x04.")
    return {"loras": [(path / "bad.ckpt", 1.0)]}


QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "missing": (lambda p: {"loras": [(p / "none.safetensors", 1.0)]}, "none.safetensors.* cannot be read"),
    "pickled": (lambda p: _pickled(p), "pickled weights are never read"),
    "empty folder": (lambda p: {"loras": [(p, 1.0)]}, "holds 0 .safetensors files"),
    "scale": (lambda p: {"loras": [(p, float("nan"))]}, "a scale of nan cannot be"),
    "no lora": (lambda p: _lora_of({"weight": torch.zeros(1)}, p), "1 of its 1 tensors are no LoRA's, .*'weight'"),
    "loha": (lambda p: _lora_of({"lora_unet_x.hada_w1_a": torch.zeros(1)}, p), "1 of its 1 tensors are no LoRA's"),
    "half a pair": (
        lambda p: _lora_of({f"{QUERY}.lora_A.weight": torch.zeros(2, 32)}, p),
        "one of its two matrices",
    ),
    "other layers": (
        lambda p: _lora_of(_pair(QUERY, 32, 32) | _pair("unet.down_blocks.7.x") | _pair("text_encoder_2.y"), p),
        "2 of its 3 layers are none of this model's, the first 'unet.down_blocks.7.x'",
    ),
    "other widths": (lambda p: _lora_of(_pair(QUERY, 24, 32), p), r"for a layer of \[32, 32\] here"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(case: str, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        with_adapters(tiny_model(), **arguments(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
