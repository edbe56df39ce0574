"""Models, tokenizers and checkpoints from strangers: an absurd setting is one line that names file and field."""

import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_pipelines as tiny
import torch
from safetensors.torch import save_file
from test_untrusted import F32, packed, refused
from tiny_run import UNET
from transformers import CLIPTokenizer

from diffusion_unet import cli
from diffusion_unet.clip import load_tokenizer
from diffusion_unet.codec import LatentCodec
from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import InputError
from diffusion_unet.model import DiffusionModel
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet
from training import checkpoint

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "reliability"))
import fuzz_files

# --- settings


TOO_MUCH: list[tuple[str, dict[str, Any], str]] = [
    ("unet", {"block_out_channels": [10**12, 8]}, "block_out_channels"),
    ("unet", {"block_out_channels": [8] * 10**5}, "block_out_channels"),
    ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
    ("unet", {"layers_per_block": [[1, 2], [3, 4]]}, "layers_per_block"),
    ("unet", {"layers_per_block": 200, "transformer_layers_per_block": 200}, "over 2048"),
    ("unet", {"cross_attention_dim": -8}, "cross_attention_dim is -8"),
    ("unet", {"norm_num_groups": "4"}, "norm_num_groups is '4'"),
    ("unet", {"in_channels": True}, "in_channels is True"),
    ("unet", {"sample_size": 10**9}, "sample_size is 1000000000"),
    ("unet", {"sample_size": [8, 8, 8]}, "sample_size"),
    ("unet", {"conv_in_kernel": 10**6 + 1}, "conv_in_kernel"),
    ("unet", {"dropout": False}, "dropout is False"),
    ("unet", {"norm_eps": "1e-5"}, "norm_eps"),
    ("unet", {"down_block_types": ["os.system", "DownBlock2D"]}, "down_block_types"),
    ("unet", {"num_class_embeds": 10**15}, "num_class_embeds"),
    ("vae", {"_class_name": "canary.AutoencoderKL"}, "an AutoencoderKL is needed"),
    ("vae", {"block_out_channels": [10**9, 10**9]}, "block_out_channels"),
    ("vae", {"layers_per_block": 10**9}, "layers_per_block is 1000000000, and must be a whole number from 1 to 64"),
    ("vae", {"latent_channels": 10**12}, "latent_channels"),
    ("vae", {"latent_channels": True}, "latent_channels is True"),
    ("vae", {"down_block_types": ["DownEncoderBlock2D", "os.system"]}, "down_block_types"),
    ("vae", {"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types"),
    ("vae", {"scaling_factor": "0.18"}, "scaling_factor is '0.18', and must be a number"),
    ("vae", {"scaling_factor": 0}, "scaling_factor is 0"),
    ("vae", {"latents_mean": [0.0] * 99, "latents_std": [1.0] * 99}, "latents_mean has 99 numbers"),
    ("vae", {"act_fn": "os.system"}, "no network can be made of it"),
    ("vae", {"norm_num_groups": 3}, "no network can be made of it"),
    ("text_encoder", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("text_encoder", {"model_type": ["clip"]}, "a CLIPTextModel is needed"),
    ("text_encoder", {"hidden_act": ["gelu"]}, "hidden_act is .*a text"),
    ("text_encoder", {"eos_token_id": "3"}, "eos_token_id is '3'"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_sd1(tmp_path_factory.mktemp("hostile") / "sd1")


@pytest.fixture
def twin(folder: Path, tmp_path: Path) -> Path:
    """A copy whose weights are links to the same files."""
    out = tmp_path / "twin"
    for path in folder.rglob("*"):
        if path.is_file():
            (out / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            target = out / path.relative_to(folder)
            target.hardlink_to(path) if path.suffix == ".safetensors" else target.write_bytes(path.read_bytes())
    return out


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("part", "changes", "match"), TOO_MUCH)
def test_settings_are_refused_before_anything_is_made(
    part: str, changes: dict[str, Any], match: str, twin: Path
) -> None:
    edit(twin / part / "config.json", **changes)
    start = time.process_time()
    refused(match, DiffusionModel.load, twin)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"num_train_timesteps": 1000.5}, "num_train_timesteps"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True"),
        ({"beta_start": "0.1"}, "beta_start is '0.1'"),
        ({"beta_end": 2}, "beta_end"),
        ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr is 'false', and must be true or false"),
        ({"trained_betas": ["a"]}, "trained_betas"),
        ({"trained_betas": [[0.1]]}, "trained_betas"),
        ({"trained_betas": [0.1]}, "trained_betas must be a list of 1000"),
        ({"timestep_spacing": ["leading"]}, "timestep_spacing"),
        ({"_class_name": "os.system"}, "_class_name"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name"),
        ({"beta_schedule": {}}, "beta_schedule"),
        ({"steps_offset": "1"}, "steps_offset"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 3, "sigma_max": 2}, "sigma_max"),
    ],
)
def test_schedules_that_cannot_be(changes: dict[str, Any], match: str) -> None:
    refused(match, NoiseSchedule.from_config, tiny.ddim().config | changes)


def test_a_flag_that_its_class_does_not_know_is_ignored() -> None:
    """As diffusers does; found by the fuzzer."""
    made = NoiseSchedule.from_config({"_class_name": "DDIMScheduler", "use_flow_sigmas": True})
    assert made.prediction_type == "epsilon" and torch.equal(made.table, NoiseSchedule.from_config({}).table)


def test_weights_that_do_not_agree_with_their_index(tmp_path: Path) -> None:
    config = {**UNET, "sample_size": 8}
    unet = UNet(UNetConfig.from_diffusers(config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors, name = unet.state_dict(), "diffusion_pytorch_model.safetensors"
    first = dict(list(tensors.items())[:3])
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(first, tmp_path / "b.safetensors")
    index = tmp_path / f"{name}.index.json"
    whole = dict.fromkeys(tensors, "a.safetensors")
    for weight_map, match in (
        (whole, None),
        (whole | dict.fromkeys(first, "b.safetensors"), "are not those that its weight_map says"),  # twice, in a and b
        (whole | {"more": "a.safetensors"}, "are not those"),
        (dict.fromkeys(tensors, "../a.safetensors"), "a file of the same folder"),
        (dict.fromkeys(tensors, "a\n.safetensors"), "a file of the same folder"),
        (dict.fromkeys(tensors, "/etc/passwd"), "a file of the same folder"),
        (dict.fromkeys(tensors, 3), "a file of the same folder"),
        (dict.fromkeys(tensors, "c.safetensors"), "c.safetensors: cannot be read"),
        ([], "a file of the same folder"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        if match is None:
            assert torch.equal(UNet.from_pretrained(tmp_path).conv_in.weight, unet.conv_in.weight)
        else:
            refused(match, UNet.from_pretrained, tmp_path)
    save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"].to(torch.int32)}, tmp_path / name)
    refused(r"conv_in\.weight is .* of torch\.int32 in the file", UNet.from_pretrained, tmp_path)


# --- tokenizers


def stock_and_ours(folder: Path) -> None:
    texts = [
        "a red boot",
        "A  Red\tBOOT's 12",
        "",
        "<|startoftext|> and <|endoftext|>!",
        "caf\u00e9 \u4e2d <word> <wörd>x",
    ]
    stock, ours = CLIPTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert ours(texts)["input_ids"] == stock(texts)["input_ids"]
    assert len(ours) == len(stock) and ours.model_max_length == stock.model_max_length
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{name}_token_id") == getattr(stock, f"{name}_token_id"), name
    lengths = {"padding": "max_length", "max_length": 12, "truncation": True}
    assert ours(texts, **lengths)["input_ids"] == stock(texts, **lengths)["input_ids"]


def old(folder: Path, **special: Any) -> Path:
    """The files of 2022: no tokenizer.json, tokens in special_tokens_map.json."""
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if special:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def test_tokenizers_are_those_that_transformers_reads(folder: Path, tmp_path: Path) -> None:
    from diffusion_unet.clip import save_tokenizer

    stock_and_ours(folder / "tokenizer")
    save_tokenizer(tiny.tokenizer(), tmp_path / "mine")
    stock_and_ours(tmp_path / "mine")
    grown = copy.deepcopy(tiny.tokenizer())
    grown.add_tokens(["<word>", "<wörd>"])
    grown.save_pretrained(tmp_path / "grown")
    stock_and_ours(tmp_path / "grown")
    token = {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    save_tokenizer(tiny.tokenizer(), tmp_path / "old")
    stock_and_ours(old(tmp_path / "old", bos_token=token, pad_token="!", eos_token="<|endoftext|>"))


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "no BPE"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": [["a", "b", "c"]]}}, "not pairs"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}, "numbered once each"),
        ("tokenizer.json", {"model": {"vocab": {"a": -1}, "merges": []}}, "numbered once each"),
        ("tokenizer.json", {"model": {"vocab": {"a": 2**32}, "merges": []}}, "numbered once each"),
        ("tokenizer.json", {"model": {"vocab": {"a": True}, "merges": []}}, "a number"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": ["a b"]}}, "cannot be read"),
        ("tokenizer.json", {"added_tokens": [{"id": 3}]}, "cannot be read"),
        ("tokenizer.json", {"added_tokens": {"a": 1}}, "cannot be read"),
        ("tokenizer_config.json", {"tokenizer_class": ["CLIPTokenizer"]}, "tokenizer_class"),
        ("tokenizer_config.json", {"tokenizer_class": "canary.Tokenizer"}, "a CLIPTokenizer is needed"),
        ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77'"),
        ("tokenizer_config.json", {"model_max_length": -1}, "model_max_length is -1"),
        ("tokenizer_config.json", {"bos_token": {"content": 3}}, "is no token"),
        ("tokenizer_config.json", {"pad_token": {"content": "a", "lstrip": "yes"}}, "is no token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, "cannot be read"),
    ],
)
def test_tokenizers_that_cannot_be(
    file: str, changes: dict[str, Any], match: str, twin: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(twin / "tokenizer" / file, **changes)
    assert str(twin / "tokenizer") in refused(match, load_tokenizer, twin / "tokenizer")
    assert capfd.readouterr().err == ""  # nor does a library say anything, as one that panics would


def test_rules_of_a_tokenizer_are_not_taken_from_its_file(folder: Path, twin: Path) -> None:
    """A pattern that never ends, rules to tear texts apart, and a length that fills every text up to it."""
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    edit(twin / "tokenizer" / "tokenizer.json", pre_tokenizer=slow, normalizer=None, padding=padding)
    texts = ["a" * 60 + "!", "A Boot"]
    assert load_tokenizer(twin / "tokenizer")(texts) == load_tokenizer(folder / "tokenizer")(texts)


def test_a_token_beyond_the_embedding_is_refused(twin: Path) -> None:
    path = twin / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocab = whole["model"]["vocab"]
    vocab["!"] = 50_000
    path.write_text(json.dumps(whole))
    refused("the tokenizer has 50001 tokens, the text encoder embeds 514", DiffusionModel.load, twin)


# --- autoencoders


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_an_autoencoder_is_that_which_diffusers_reads(dtype: torch.dtype | None, folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    stored = AutoencoderKL.from_pretrained(folder / "vae").half()
    stored.save_pretrained(tmp_path)
    kind: dict[str, Any] = {"torch_dtype": dtype} if dtype else {}
    stock, ours = AutoencoderKL.from_pretrained(tmp_path, **kind), LatentCodec.load(tmp_path, dtype=dtype).vae
    assert ours.dtype == stock.dtype and not ours.training
    for (name, one), (other, two) in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other and torch.equal(one, two)
    known = [key for key in stock.config if not key.startswith("_")]
    assert [ours.config[key] for key in known] == [stock.config[key] for key in known]


# --- checkpoints


def test_states_that_cannot_be(tmp_path: Path) -> None:
    weights = {"model": {"a": torch.ones(2)}}
    state: dict[str, Any] = {
        "seconds": 1.0, "look_due": True, "levels": {"sums": [1.0], "counts": [2]}, "optimizer": {}, "config": {},
        "changes": [],
    }  # fmt: skip
    path = checkpoint.save(tmp_path, 3, state, weights, None)
    checkpoint.check_state(checkpoint.read(path))
    for changes, match in (
        ({"step": True}, "step is True"),
        ({"step": -1}, "step is -1"),
        ({"step": "3"}, "step is '3'"),
        ({"step": None}, "no step"),
        ({"seconds": "1"}, "seconds is '1'"),
        ({"seconds": None}, "no seconds"),
        ({"look_due": 1}, "look_due is 1"),
        ({"levels": [1]}, "levels is"),
        ({"levels": {"sums": ["a"], "counts": [1]}}, "sums is"),
        ({"levels": {"sums": [1.0], "counts": []}}, "levels needs sums and counts"),
        ({"optimizer": []}, "optimizer is"),
        ({"config": None}, "no config"),
        ({"changes": [3]}, "changes is"),
    ):
        (path / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": 3, **state, **changes}))
        fuzz_files.sign(tmp_path)
        text = refused(match, lambda: checkpoint.check_state(checkpoint.read(path)))
        assert str(path / "state.json") in text


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a\nb", "", "a\0b", "x" * 300])
def test_a_manifest_names_files_of_its_folder_only(name: str, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, {}, {"model": {"a": torch.ones(2)}}, None)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    refused("missing", checkpoint.read, path)


# --- what info says, and the command line


def test_info_lists_what_it_ignores(twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(twin / "unet" / "config.json", trust_remote_code=True)
    edit(twin / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.M"})
    edit(twin / "scheduler" / "scheduler_config.json", evil_setting=1)
    edit(twin / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.T"})
    edit(twin / "model_index.json", evil_part=["evil", "Evil"])
    assert cli.main(["info", str(twin)]) == 0
    said = capsys.readouterr().out
    for part, key in {
        "unet": "trust_remote_code", "text_encoder": "auto_map", "scheduler_config.ignored keys": "evil_setting",
        "tokenizer_config.ignored keys": "auto_map", "model_index.ignored keys": "evil_part",
    }.items():  # fmt: skip
        line = next(line for line in said.splitlines() if line.startswith(part))
        assert "ignored keys" in line and key in line


def test_the_command_line_tells_one_line_and_2(twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (twin / "bomb.yaml").write_text(
        "model: &a {unet: [1, 1, 1, 1, 1, 1, 1, 1, 1]}\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12))
    )
    (twin / "keys.yaml").write_text("model: {" + ", ".join(f"a{i}: 1" for i in range(14000)) + "}")
    for name, said in (("bomb.yaml", "too many"), ("keys.yaml", "over ")):
        start = time.process_time()
        assert cli.main(["info", str(twin / name)]) == 2 and said in capsys.readouterr().err
        assert time.process_time() - start < 5
    (twin / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (twin / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(packed({"a": F32}, bytes(23)))
    for argv in (["info", str(twin)], ["sample", str(twin), "a bag", "--out", str(twin / "out")]):
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: ") and "take 24 bytes" in said


# --- many


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    fuzz_files.make_corpus(out)
    return out


FEW = {"single file": 2, "xl model": 3, "latent model": 8, "sharded": 8, "clip": 8, "parquet": 4}


@pytest.mark.parametrize("name", fuzz_files.GROUPS)
def test_mutated_files_are_loaded_or_refused(name: str, corpus: Path, tmp_path: Path) -> None:
    group = fuzz_files.GROUPS[name]
    assert fuzz_files.attempt(group, corpus / group.folder) == "loaded"
    for number in range(FEW.get(name, 16)):
        folder = fuzz_files.case(name, corpus, tmp_path / "case", 7, number)
        outcome = fuzz_files.attempt(group, folder)
        assert outcome in ("loaded", "refused"), f"case {number}: {outcome}"


def test_the_fuzzer_can_fail(corpus: Path, tmp_path: Path) -> None:
    """Readers that raise, end the process, and tell in two lines: none passes as refused."""

    def tells_in_two(folder: Path) -> None:
        raise InputError("one\ntwo")

    readers = {"raises": lambda folder: 1 / 0, "two lines": tells_in_two, "ends": lambda folder: os._exit(3)}
    for name, read in readers.items():
        fuzz_files.GROUPS[name] = fuzz_files.Group("lora", ("*",), read)
        try:
            found = fuzz_files.run_group(name, corpus, tmp_path / "case", 0, 3)
        finally:
            del fuzz_files.GROUPS[name]
        assert len(found) == 3 and not {"loaded", "refused"} & {*found.values()}, found
