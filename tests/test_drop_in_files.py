"""The drop-in reads and writes diffusers' files: folders, hub caches, original single files and whole pipelines."""

import copy
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as Stock
from diffusers.utils import hub_utils
from families import FAMILIES, NARROW, SD15, inputs, narrow, stock_call
from huggingface_hub import RepoUrl
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_unet import UNet2DConditionModel as Ours
from diffusion_unet import unet_2d_condition

# What diffusers passes on to the hub's library, at every look into its cache.
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")

TINY = narrow(
    {key: value for key, value in SD15.items() if not key.startswith("_")},
    block_out_channels=[16, 32],
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    layers_per_block=1,
)
K_BLOCKS = {
    **TINY,
    "act_fn": "gelu",
    "block_out_channels": [32],
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "down_block_types": ["KCrossAttnDownBlock2D"],
    "mid_block_type": None,
    "norm_num_groups": None,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_dim": 32,
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "up_block_types": ["KCrossAttnUpBlock2D"],
}
FOREIGN = {
    "k-blocks": K_BLOCKS,
    "skip-time-act": {**TINY, "resnet_skip_time_act": True},
    "gligen": {**TINY, "attention_type": "gated"},
    "deepfloyd": {
        **TINY,
        "down_block_types": ["SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "resnet_time_scale_shift": "scale_shift",
        "up_block_types": ["ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"],
    },
}

# How a folder is written, and what must then be said to read it.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "plain": ({}, {}, ["diffusion_pytorch_model.safetensors"]),
    "variant": ({"variant": "ema"}, {"variant": "ema"}, ["diffusion_pytorch_model.ema.safetensors"]),
    "sharded": (
        {"max_shard_size": "300KB"},
        {},
        [f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        + ["diffusion_pytorch_model.safetensors.index.json"],
    ),
    "sharded-variant": (
        {"max_shard_size": "300KB", "variant": "ema"},
        {"variant": "ema"},
        [f"diffusion_pytorch_model.ema-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        + ["diffusion_pytorch_model.safetensors.index.ema.json"],
    ),
}


def stock_unet(config: dict[str, Any] = TINY, seed: int = 0) -> Stock:
    """The stock class with random weights everywhere (norms and biases too), in eval mode."""
    torch.manual_seed(seed)
    stock = Stock.from_config(config)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    return stock.eval()


def ours_like(stock: Stock) -> Ours:
    ours = Ours.from_config(stock.config)
    ours.load_state_dict(stock.state_dict())
    return ours.eval()


@torch.no_grad()
def output(unet: nn.Module, config: dict[str, Any] = TINY) -> Tensor:
    values = inputs(config, mask=False)
    return stock_call(unet, {k: v.to(unet.dtype) if v.is_floating_point() else v for k, v in values.items()})


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, tensor), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


def assert_equal(ours: nn.Module, stock: nn.Module, config: dict[str, Any] = TINY) -> None:
    """Ours, with its own layers inside, has the very weights of the stock one, and predicts the same."""
    assert type(ours) is Ours and ours.native
    assert_same_weights(ours, stock)
    torch.testing.assert_close(output(ours, config), output(stock, config), rtol=1e-4, atol=1e-5)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "subfolder"),
    [("plain", None), ("plain", "unet"), ("variant", None), ("sharded", None), ("sharded-variant", "unet")],
)
def test_each_class_reads_what_the_other_one_wrote(layout: str, subfolder: str | None, tmp_path: Path) -> None:
    how_written, how_read, _ = LAYOUTS[layout]
    for writer, reader in ((Stock, Ours), (Ours, Stock)):
        stock = stock_unet()
        folder = tmp_path / writer.__module__
        written = stock if writer is Stock else ours_like(stock)
        written.save_pretrained(folder / (subfolder or ""), **how_written)
        unet = reader.from_pretrained(folder, subfolder=subfolder, **how_read)
        assert type(unet) is reader and not unet.training
        if reader is Ours:
            assert_equal(unet, stock)
        else:
            assert_equal(written, unet)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_byte_for_byte_those_that_the_stock_class_writes(layout: str, tmp_path: Path) -> None:
    stock = stock_unet()
    how, _, names = LAYOUTS[layout]
    stock.save_pretrained(tmp_path / "stock", **how)
    ours_like(stock).save_pretrained(tmp_path / "ours", **how)
    written = files(tmp_path / "ours")
    assert written == files(tmp_path / "stock")
    assert sorted(written) == sorted(["config.json", *names])
    assert json.loads(written["config.json"])["_class_name"] == "UNet2DConditionModel"


def test_loading_and_saving_again_changes_nothing_but_what_the_stock_class_changes(tmp_path: Path) -> None:
    stock_unet().save_pretrained(tmp_path / "first")
    for cls in (Stock, Ours):
        cls.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / cls.__module__)
    again = files(tmp_path / Ours.__module__)
    assert again == files(tmp_path / Stock.__module__)
    assert (
        again["diffusion_pytorch_model.safetensors"] == files(tmp_path / "first")["diffusion_pytorch_model.safetensors"]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    stock_unet().save_pretrained(tmp_path)
    stock, ours = (cls.from_pretrained(tmp_path, torch_dtype=dtype) for cls in (Stock, Ours))
    assert ours.native and ours.dtype == dtype
    assert_same_weights(ours, stock)
    exact = output(Stock.from_pretrained(tmp_path))
    errors = [float((output(unet).float() - exact).square().mean().sqrt()) for unet in (ours, stock)]
    assert output(ours).dtype == dtype
    assert 0 < errors[0] < 1.5 * errors[1] < 0.1 * float(exact.square().mean().sqrt())


def test_a_half_precision_variant_stands_beside_the_full_one(tmp_path: Path) -> None:
    stock = stock_unet()
    ours = ours_like(stock)
    ours.save_pretrained(tmp_path)
    ours.half().save_pretrained(tmp_path, variant="fp16")
    assert_equal(Ours.from_pretrained(tmp_path), stock)
    half = Ours.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert_same_weights(half, stock.half())


DEVICE_MAPS = {
    "name": "cpu",
    "device": torch.device("cpu"),
    "dict": {"": "cpu"},
    "auto": "auto",
    "disk": dict.fromkeys(("conv_in", "time_proj", "time_embedding", "down_blocks"), "cpu")
    | dict.fromkeys(("mid_block", "up_blocks", "conv_norm_out"), "disk")
    | dict.fromkeys(("conv_act", "conv_out"), "cpu"),
}


@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_device_map(name: str, tmp_path: Path) -> None:
    expected = stock_unet()
    expected.save_pretrained(tmp_path / "unet")
    options = {"device_map": DEVICE_MAPS[name], "max_memory": {"cpu": "1GB"}}  # "auto" without an accelerator
    stock, ours = (
        cls.from_pretrained(tmp_path / "unet", **options, offload_folder=tmp_path / cls.__module__)
        for cls in (Stock, Ours)
    )
    assert ours.native and ours.hf_device_map == stock.hf_device_map
    assert [p.device for p in ours.parameters()] == [p.device for p in stock.parameters()]
    assert any(p.is_meta for p in ours.parameters()) == (name == "disk")
    for unet in (ours, stock):
        torch.testing.assert_close(output(unet), output(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [True, False])
def test_low_cpu_mem_usage_builds_without_memory_and_fills_everything(
    low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = stock_unet()
    stock.save_pretrained(tmp_path)
    built: list[bool] = []

    def from_config(*args: Any, **kwargs: Any) -> Ours:
        unet = Stock.from_config.__func__(Ours, *args, **kwargs)
        built.append(all(parameter.is_meta for parameter in unet.parameters()))
        return unet

    monkeypatch.setattr(Ours, "from_config", from_config)
    unet, info = Ours.from_pretrained(tmp_path, low_cpu_mem_usage=low, output_loading_info=True)
    assert built == [low]
    assert not any(info.values())
    monkeypatch.undo()
    assert_equal(unet, stock)


# --- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dict", "stock's", "file", "keywords"])
def test_from_config_builds_the_stock_network_from_the_same_seed(kind: str, tmp_path: Path) -> None:
    Stock.from_config(TINY).save_config(tmp_path)
    models = []
    for cls in (Stock, Ours):
        torch.manual_seed(3)
        if kind == "keywords":
            model = cls(**{key: value for key, value in TINY.items() if not key.startswith("_")})
        elif kind == "file":
            model = cls.from_config(cls.load_config(tmp_path))
        else:
            model = cls.from_config(TINY if kind == "dict" else Stock.from_config(TINY).config)
        models.append(model.eval())
    stock, ours = models
    assert_equal(ours, stock)
    assert dict(ours.config) == dict(stock.config)


def test_deepcopy_is_a_native_network_of_its_own() -> None:
    stock = stock_unet()
    ours = ours_like(stock)
    twin = copy.deepcopy(ours)
    assert_equal(twin, stock)
    nn.init.zeros_(ours.conv_out.weight)
    assert_equal(twin, stock)


@pytest.mark.parametrize("name", FOREIGN)
def test_configurations_outside_the_core_are_loaded_and_saved_with_the_stock_body(name: str, tmp_path: Path) -> None:
    config = FOREIGN[name]
    stock = stock_unet(config)
    stock.save_pretrained(tmp_path / "stock")
    ours = Ours.from_pretrained(tmp_path / "stock")
    assert type(ours) is Ours and ours.native is False
    assert {type(module).__module__.split(".")[0] for module in list(ours.modules())[1:]} <= {"diffusers", "torch"}
    torch.testing.assert_close(output(ours, config), output(stock, config), rtol=1e-4, atol=1e-5)
    from_config = ours_like(stock)
    assert from_config.native is False
    from_config.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "stock")


def test_one_log_line_says_once_that_the_stock_body_runs_and_why(caplog: pytest.LogCaptureFixture) -> None:
    unet_2d_condition._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="diffusion_unet"):
        Ours.from_config(TINY)
        assert not caplog.records
        for _ in range(2):
            Ours.from_config(FOREIGN["skip-time-act"])
        assert len(caplog.records) == 1
        assert "resnet_skip_time_act" in caplog.messages[0] and "diffusers" in caplog.messages[0]
        Ours.from_config(FOREIGN["gligen"])
        assert "attention_type" in caplog.messages[1]


# --- the hub -------------------------------------------------------------------------------------------------------


def put_into_cache(cache: Path, repository: str, source: Path, *, branch: str = "main", commit: str = "0" * 40) -> None:
    """What a download from the hub leaves: a snapshot by its commit, and a branch's file that names it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / branch).write_text(commit)


@pytest.mark.parametrize("layout", ["plain", "sharded-variant"])
def test_a_hub_id_is_found_in_the_cache(layout: str, tmp_path: Path) -> None:
    how_written, how_read, _ = LAYOUTS[layout]
    branches = {"main": stock_unet(seed=1), "other": stock_unet(seed=2)}
    for branch, stock in branches.items():
        stock.save_pretrained(tmp_path / branch / "unet", **how_written)
        commit = ("a" if branch == "main" else "b") * 40
        put_into_cache(tmp_path / "cache", "someone/tiny", tmp_path / branch, branch=branch, commit=commit)
    for branch, stock in branches.items():
        options: dict[str, Any] = {} if branch == "main" else {"revision": branch}
        if "sharded" in layout:  # diffusers asks the hub what there is, unless told not to
            options["local_files_only"] = True
        unet = Ours.from_pretrained(
            "someone/tiny", subfolder="unet", cache_dir=tmp_path / "cache", **how_read, **options
        )
        assert_equal(unet, stock)
        assert unet.config["_name_or_path"] == "someone/tiny"


def test_a_hub_id_that_is_not_in_the_cache_is_an_error_as_with_the_stock_class(tmp_path: Path) -> None:
    messages = []
    for cls in (Stock, Ours):
        with pytest.raises(OSError, match="someone/tiny") as caught:
            cls.from_pretrained("someone/tiny", cache_dir=tmp_path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("options", [{}, {"subfolder": "unet", "variant": "fp16"}], ids=["plain", "options"])
def test_push_to_hub_uploads_what_the_stock_class_uploads(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[tuple[dict[str, bytes], dict[str, Any]]] = []

    def create_repo(repo_id: str, **kwargs: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(*, folder_path: str, **kwargs: Any) -> str:
        uploads.append((files(Path(folder_path)), kwargs))
        return "the commit"

    monkeypatch.setattr(hub_utils, "create_repo", create_repo)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    stock = stock_unet()
    for unet in (stock, ours_like(stock)):
        assert unet.push_to_hub("someone/tiny", **options) == "the commit"
    assert uploads[0] == uploads[1]
    uploaded, request = uploads[1]
    assert request["repo_id"] == "someone/tiny" and request["path_in_repo"] == options.get("subfolder")
    weights = "diffusion_pytorch_model.fp16.safetensors" if options else "diffusion_pytorch_model.safetensors"
    assert {"config.json", weights} <= uploaded.keys()
    assert json.loads(uploaded["config.json"])["_class_name"] == "UNet2DConditionModel"


# --- original single files -----------------------------------------------------------------------------------------

SAME_PLACE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(key: str, config: dict[str, Any]) -> str:
    """Where CompVis' and Stability's code keeps a weight: blocks are numbered through, whatever their level."""
    module, parameter = key.rsplit(".", 1)
    if module in SAME_PLACE:
        return f"model.diffusion_model.{SAME_PLACE[module]}.{parameter}"
    side, *path = module.split(".")
    level = 0 if side == "mid_block" else int(path.pop(0))
    kind, index, *inner = path
    last = config["layers_per_block"]  # a level's last block going down only resizes, going up is one layer more
    column = {"resnets": "0", "attentions": "1"}.get(kind)
    if side == "mid_block":
        block = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    elif side == "down_blocks":
        row = 1 + level * (last + 1) + (last if kind == "downsamplers" else int(index))
        block = f"input_blocks.{row}.{column or '0'}"
    else:
        row = level * (last + 1) + (last if kind == "upsamplers" else int(index))
        after = "2" if config["up_block_types"][level].startswith("CrossAttn") else "1"
        block = f"output_blocks.{row}.{column or after}"
    if kind == "resnets":
        inner = [IN_A_RESNET[inner[0]]]
    elif kind == "downsamplers":
        inner = ["op"]
    return ".".join(["model.diffusion_model", block, *inner, parameter])


def original_state_dict(unet: nn.Module, config: dict[str, Any]) -> dict[str, Tensor]:
    """The network's weights under their original names, among some of the other weights of such a file."""
    tensors = {original_name(key, config): tensor for key, tensor in unet.state_dict().items()}
    assert len(tensors) == len(unet.state_dict())
    others = ["first_stage_model.encoder.conv_in.weight", "model_ema.decay"]
    if config.get("addition_embed_type"):
        others.append("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias")
    return tensors | {name: torch.zeros(1) for name in others}


REPOSITORIES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
TENSORS = {"sd15": 686, "sd21": 686, "sdxl": 1680}  # in the released files


@pytest.mark.parametrize("family", REPOSITORIES)
def test_from_single_file_of_the_original_layout(family: str, tmp_path: Path) -> None:
    config = NARROW[family]
    written = stock_unet(config)
    save_file(original_state_dict(written, config), tmp_path / "model.safetensors")
    written.save_config(tmp_path / "repository" / "unet")
    stock, ours = (
        cls.from_single_file(str(tmp_path / "model.safetensors"), config=str(tmp_path / "repository"), subfolder="unet")
        for cls in (Stock, Ours)
    )
    assert_same_weights(ours, written)
    assert_equal(ours, stock, config)
    assert dict(ours.config) == dict(stock.config)


@pytest.mark.parametrize("family", REPOSITORIES)
def test_a_full_width_single_file_is_recognised_by_its_keys_and_its_shapes_fit(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        stock = Stock.from_config(FAMILIES[family])
    stock.save_config(tmp_path / "repository" / "unet")
    put_into_cache(tmp_path / "cache", REPOSITORIES[family], tmp_path / "repository")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    tensors = original_state_dict(stock, FAMILIES[family])
    assert sum(key.startswith("model.diffusion_model.") for key in tensors) == TENSORS[family]
    ours = Ours.from_single_file(tensors, device="meta")
    assert ours.native
    assert ours.to_json_string() == stock.to_json_string()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}


def test_a_single_file_with_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    written = stock_unet()
    written.save_config(tmp_path)
    tensors = original_state_dict(written, TINY)
    key = original_name("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", TINY)
    with pytest.raises(ValueError, match="shape"):
        Ours.from_single_file(tensors | {key: tensors[key][1:]}, config=str(tmp_path))


def test_from_single_file_with_the_original_configuration(tmp_path: Path) -> None:
    config = {**TINY, "attention_head_dim": 8, "block_out_channels": [32, 64], "norm_num_groups": 32}
    original = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 8,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 24,
    }
    first_stage = {"params": {"ddconfig": {"ch_mult": [1, 2, 4, 4]}}}
    yaml = {"model": {"params": {"unet_config": {"params": original}, "first_stage_config": first_stage}}}
    (tmp_path / "inference.yaml").write_text(json.dumps(yaml))  # JSON is YAML
    expected = stock_unet(config)
    save_file(original_state_dict(expected, config), tmp_path / "model.safetensors")
    ours = Ours.from_single_file(
        str(tmp_path / "model.safetensors"),
        original_config=str(tmp_path / "inference.yaml"),
        torch_dtype=torch.float32,
    )
    assert_equal(ours, expected, config)


def test_from_single_file_of_a_network_alone_in_the_folder_layout(tmp_path: Path) -> None:
    stock = stock_unet()
    stock.save_pretrained(tmp_path)
    file = str(tmp_path / "diffusion_pytorch_model.safetensors")
    assert_equal(Ours.from_single_file(file, config=str(tmp_path)), stock)


# --- whole pipelines -----------------------------------------------------------------------------------------------

ABSENT = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
SOMEBODY_ELSE = """
import sys
# Without this project; the others are only slow to import.
sys.modules |= dict.fromkeys(("diffusion_unet", "training", "sampling", "torchao", "bitsandbytes", "peft"))
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

folder, given, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, vae=None, text_encoder=None, tokenizer=None)
pipe.set_progress_bar_config(disable=True)
print(type(pipe).__name__, type(pipe.unet).__module__, type(pipe.unet).__name__)
save_file({"latents": pipe(**load_file(given), num_inference_steps=2, output_type="latent").images}, out)
"""


def prompt() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {"prompt_embeds": (1, 7, 24), "negative_prompt_embeds": (1, 7, 24), "latents": (1, 4, 8, 8)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def draw(pipe: DiffusionPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**prompt(), num_inference_steps=2, output_type="latent").images


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline, less what is not needed for drawing latents, saved with our network."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = StableDiffusionPipeline(
        **ABSENT,
        unet=ours_like(stock_unet()),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def test_a_saved_pipeline_names_the_stock_class(pipeline_folder: Path) -> None:
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert json.loads((pipeline_folder / "unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_whoever_has_not_this_project_loads_the_pipeline_and_draws_the_same(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    unet = Ours.from_pretrained(pipeline_folder, subfolder="unet")
    ours = draw(DiffusionPipeline.from_pretrained(pipeline_folder, **ABSENT, unet=unet))
    save_file(prompt(), tmp_path / "given.safetensors")
    arguments = [str(pipeline_folder), "given.safetensors", "latents.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", SOMEBODY_ELSE, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["StableDiffusionPipeline", Stock.__module__, "UNet2DConditionModel"]
    theirs = load_file(tmp_path / "latents.safetensors")["latents"]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (theirs - prompt()["latents"]).abs().mean() > 0.1


def test_from_pretrained_takes_our_network_for_its_unet(pipeline_folder: Path, tmp_path: Path) -> None:
    unet = ours_like(stock_unet(seed=9))
    ours, stock = (
        DiffusionPipeline.from_pretrained(pipeline_folder, **ABSENT, unet=given) for given in (unet, stock_unet(seed=9))
    )
    assert ours.unet is unet
    assert isinstance(ours, StableDiffusionPipeline)
    torch.testing.assert_close(draw(ours), draw(stock), rtol=1e-4, atol=1e-5)
    folders_own = DiffusionPipeline.from_pretrained(pipeline_folder, **ABSENT)
    assert type(folders_own.unet) is Stock
    assert not torch.allclose(draw(ours), draw(folders_own), atol=1e-2)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert files(tmp_path / "ours") == files(tmp_path / "stock")
