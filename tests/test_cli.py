"""The command line: one-line errors and their exit codes, quick help, pictures with their record, what `info` says."""

import errno
import json
import resource
import shlex
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_unet import arguments, cli, options
from diffusion_unet.arguments import seeds, size, split_overrides
from diffusion_unet.codec import PixelCodec
from diffusion_unet.conditioning import new_text_encoder, train_tokenizer
from diffusion_unet.config import UNetConfig
from diffusion_unet.errors import Failure, InputError, NonFiniteError, SaveError, Stopped
from diffusion_unet.model import DiffusionModel
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import UNet

ROOT = Path(__file__).resolve().parent.parent
TINY_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a bag", "a coat"], vocab_size=520, max_length=12)
    text = new_text_encoder(tokenizer, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    unet = UNet(UNetConfig.from_diffusers(TINY_UNET))
    schedule = NoiseSchedule.cosine(1000, prediction_type="v_prediction")
    return DiffusionModel(unet, schedule, text, PixelCodec(1)).save(tmp_path_factory.mktemp("made") / "model")


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line that these arguments are refused with."""
    assert cli.main([str(word) for word in argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


# --- help


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_is_quick_and_does_without_torch(verb: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "diffusion_unet", verb, "--help"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what else the machine does is not counted.
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: diffusion-unet {verb}")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "diffusion_unet.cli" in imported
    assert not imported & {"torch", "numpy", "transformers", "diffusers", "PIL"}
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_examples_in_help_are_taken(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.config import load_config

    monkeypatch.chdir(ROOT)
    prefixes = ("diffusion-unet ", "accelerate launch -m diffusion_unet ")
    lines = [line.strip() for line in cli.VERBS[verb].examples.splitlines()]
    commands = [line.removeprefix(prefix) for line in lines for prefix in prefixes if line.startswith(prefix)]
    assert commands
    for command in commands:
        parsed = cli._parse(shlex.split(command))
        assert parsed.run is cli.VERBS[verb].run
        if verb in ("train", "quickstart"):
            config = getattr(parsed, "config", cli.CONFIGS / "quickstart.yaml")
            assert load_config(config, ["--train.output_dir=x", *parsed.overrides]).train.output_dir


def test_train_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from training.config import settings

    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{setting.key}=" in printed for setting in settings() if setting.type)


def test_the_solvers_and_limits_are_those_of_sampling() -> None:
    from sampling.levels import MAX_STEPS, SPACINGS
    from sampling.noise import RNGS
    from sampling.request import MAX_SIDE
    from sampling.solvers import SOLVERS

    assert (set(options.NAMES), options.RNGS, options.SPACINGS) == (set(SOLVERS), RNGS, SPACINGS)
    assert (arguments.MAX_STEPS, arguments.MAX_SIDE) == (MAX_STEPS, MAX_SIDE)


def test_a_config_that_comes_along_is_found_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert options.find_config("emoji-32") == cli.CONFIGS / "emoji-32.yaml"
    assert options.find_config("../configs/quickstart") == Path("../configs/quickstart")
    assert "got 0" in refused(capsys, "train", "quickstart", "--train.max_train_steps=0")
    (tmp_path / "quickstart").write_text("one's own")
    assert options.find_config("quickstart") == Path("quickstart")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "emoji-32, latents-clip" in shown and "sdxl-lora" in shown


# --- errors


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian x", "unknown verb trian: did you mean train?"),
        ("frobnicate", "the verbs are quickstart, check, train"),
        ("sample", "MODEL"),
        ("sample m a --step 3", "unknown argument --step: did you mean --steps?"),
        ("sample m a --steps 0", "'0' is no whole number from 1"),
        ("sample m a --steps 10001", "at most 10000"),
        ("sample m a --steps many", "argument --steps"),
        ("sample m a --seeds 7-0", "0-7 or 0,3"),
        ("sample m a --seeds 1,1", "twice"),
        ("sample m a --seeds 18446744073709551616", "2**64 - 1"),
        ("sample m a --size 32", "512x768"),
        ("sample m a --size 0x32", "512x768"),
        ("sample m a --size 32x16385", "at most 16384"),
        ("sample m a --guidance-scale nan", "no finite number"),
        ("sample m a --solver eular", "--solver"),
        ("sample m a --interval 5.42:0.28", "0.28:5.42"),
        ("sample m a --sigmas 3,two", "no finite number"),
        ("sample m a --rng dice", "--rng"),
        ("sample m a --variation-seed 1-3", "several seeds"),
        ("replay no.png", "no.png"),
        ("sample no/model a", "no/model"),
        ("export only-one", "OUT"),
        ("export no/run out", "no/run"),
        ("evaluate no/model", "no/model"),
        ("info no/thing", "no such file or folder"),
        ("train no/config.yaml", "no/config.yaml"),
        ("train", "CONFIG"),
        ("train configs/quickstart.yaml --train.max_train_stepz=5", "max_train_steps"),
        ("train configs/quickstart.yaml --train.max_train_steps=many", "train.max_train_steps"),
        ("train configs/quickstart.yaml --train.max_train_steps", "a value is missing"),
        ("train configs/quickstart.yaml --verbose", "unknown argument --verbose"),
        ("train configs/quickstart.yaml --seed=3", "unknown argument --seed=3: did you mean --train.seed?"),
        ("train x --learning_rate 1", "unknown argument --learning_rate: did you mean --optimizer.learning_rate?"),
        ("check x --train_data_dir=x", "did you mean --data.train_data_dir?"),
        ("train configs/quickstart", "configs/quickstart: the config file cannot be read (No such file"),
        ("train quickstrat", "quickstrat: there is no such config file: did you mean quickstart"),
        ("train quickstart --train.output_dir=", "train.output_dir: is empty"),
        ("quickstart --train.output_dir=x", "--output-dir"),
        ("quickstart --train.output_dir x", "--output-dir"),
        ("quickstart --output-dirr x", "did you mean --output-dir?"),
        ("quickstart --train.sed=1", "seed"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert words in refused(capsys, *argv.split())


def raising(error: BaseException) -> Callable[[object], None]:
    def run(_: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (InputError("bad\nthing"), 2),
        (NonFiniteError("nan"), 3),
        (SaveError("full"), 4),
        (Stopped("stopped"), 75),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 4),
        (OSError(errno.ENAMETOOLONG, "File name too long", "file"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_failure_has_its_exit_code_and_one_line(
    error: BaseException, exit_code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.VERBS, "info", cli.VERBS["info"]._replace(run=raising(error)))
    assert cli.main(["info", "x"]) == exit_code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out


def test_an_error_that_is_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError(), OSError(errno.EIO, "Input/output error"), BrokenPipeError()):
        monkeypatch.setitem(cli.VERBS, "info", cli.VERBS["info"]._replace(run=raising(error)))
        with pytest.raises(type(error)):
            cli.main(["info", "x"])


def test_the_process_ends_with_the_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_unet", "info", "no/thing"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("verb", ["info configs/sd15.json", "train --help"])
def test_a_reader_that_leaves_ends_it_quietly(verb: str) -> None:
    command = [sys.executable, "-m", "diffusion_unet", *verb.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_every_failure_has_a_code_of_its_own() -> None:
    codes = [failure.exit_code for failure in Failure.__subclasses__()]
    assert sorted(codes) == [2, 3, 4, 75]


# --- arguments


def test_seeds_and_sizes() -> None:
    assert seeds("0-3") == [0, 1, 2, 3]
    assert seeds("0,3") == [0, 3]
    assert seeds("5,0-1,18446744073709551615") == [5, 0, 1, 2**64 - 1]
    assert size("512x768") == (768, 512)


def test_overrides_with_and_without_equals_sign_anywhere() -> None:
    given = ["--a.b", "1", "config.yaml", "--c.d=[x, y]", "--e.f", "-1", "--plain"]
    assert split_overrides(given) == (["config.yaml", "--plain"], ["--a.b=1", "--c.d=[x, y]", "--e.f=-1"])


def test_options_may_stand_between_the_words() -> None:
    for words in (["--seeds", "0-3", "a bag", "a coat"], ["a bag", "--seeds", "0-3", "a coat"]):
        parsed = cli._parse(["sample", "model", *words])
        assert (parsed.model, parsed.prompts, parsed.seeds) == ("model", ["a bag", "a coat"], [0, 1, 2, 3])


# --- sample and info


def test_sample_writes_pictures_with_their_record_and_a_grid(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["sample", str(model_folder), "a bag", "a coat", "--seeds", "3,7", "--steps", "2", "--out", str(out)]
    assert cli.main(argv) == 0
    names = ["00000-3.png", "00000-7.png", "00001-3.png", "00001-7.png", "grid.png"]
    assert sorted(file.name for file in out.iterdir()) == names
    with Image.open(out / "00001-7.png") as image:
        assert image.size == (8, 8)
        record = json.loads(image.info["diffusion_unet"])
    wanted = {"prompt": "a coat", "seed": 7, "steps": 2, "solver": "dpm++2m", "guidance_scale": 4.0}
    assert wanted.items() <= record.items() and len(record["model_hash"]) == 64
    with Image.open(out / "grid.png") as sheet:
        assert sheet.width > 16 and sheet.height > 16

    capsys.readouterr()
    assert cli.main(["info", str(out / "00001-7.png")]) == 0
    printed = capsys.readouterr().out
    assert "kind: picture" in printed and "record.prompt: a coat" in printed and "record.seed: 7" in printed


def test_a_second_call_overwrites_nothing(model_folder: Path, tmp_path: Path) -> None:
    argv = ["sample", str(model_folder), "--seeds", "0,5", "a bag", "--steps", "1", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "00041-5.png").touch()  # the next is 42, whatever is missing before it
    assert cli.main([*argv, "a coat"]) == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.items() <= after.items()
    new = {f"000{number}-{seed}.png" for number in (42, 43) for seed in (0, 5)}
    assert after.keys() - before.keys() == {"00041-5.png", "grid-00042.png", *new}
    again, drawn = (np.asarray(Image.open(tmp_path / f"{name}-5.png")).astype(int) for name in ("00042", "00000"))
    assert np.abs(again - drawn).max() <= 1


def test_a_file_of_prompts_with_seeds_and_previews(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a bag", "seed": 7}\n{"prompt": "a coat", "negative_prompt": "a"}\n'
    )
    out, frames = tmp_path / "out", tmp_path / "frames"
    argv = ["sample", model_folder, "a", "--prompts", tmp_path / "prompts.jsonl", "--seeds", "1,2", "--steps", "2"]
    assert cli.main([str(word) for word in [*argv, "--out", out, "--preview", frames]]) == 0
    names = ["00000-1", "00000-2", "00001-7", "00002-1", "00002-2"]
    assert sorted(path.stem for path in out.iterdir()) == names  # no grid: the rows are not of one length
    assert sorted(path.stem for path in frames.iterdir()) == [f"{name}-00{step}" for name in names for step in (1, 2)]
    last, picture = (np.asarray(Image.open(path)) for path in (frames / "00001-7-002.png", out / "00001-7.png"))
    assert np.array_equal(last, picture)
    with Image.open(out / "00002-2.png") as image:
        record = json.loads(image.info["diffusion_unet"])
    assert (record["prompt"], record["negative_prompt"], record["seed"]) == ("a coat", "a", 2)


def test_a_picture_is_drawn_from_a_picture_and_replayed(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sample", str(model_folder), "a bag", "--steps", "2", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    changed = ["--image", str(tmp_path / "00000-0.png"), "--strength", "0.5", "--solver", "Euler a", "--seeds", "4"]
    assert cli.main([*argv, *changed, "--exact", "--interval", ":5", "--spacing", "karras"]) == 0
    capsys.readouterr()
    for name in ("00000-0.png", "00001-4.png"):
        assert cli.main(["replay", str(tmp_path / name), "--out", str(tmp_path / "again.png")]) == 0
        assert "bit-identical" in capsys.readouterr().out
        assert Image.open(tmp_path / "again.png").tobytes() == Image.open(tmp_path / name).tobytes()
    strange = refused(capsys, "replay", tmp_path / "00001-4.png", "--model", other(model_folder, tmp_path))
    assert "a record from another model" in strange
    (tmp_path / "00000-0.png").unlink()
    assert "give it, --file FILE" in refused(capsys, "replay", tmp_path / "00001-4.png")


def other(model_folder: Path, tmp_path: Path) -> Path:
    model = DiffusionModel.load(model_folder)
    with torch.no_grad():
        model.unet.conv_out.bias.add_(1)
    return model.save(tmp_path / "other")


def test_an_interrupted_call_keeps_what_is_drawn(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sampling import sampler

    draw, calls = sampler._draw_batch, []

    def interrupted(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*given)

    monkeypatch.setattr(sampler, "_draw_batch", interrupted)
    argv = ["sample", str(model_folder), "a bag", "a coat", "--seeds", "0-2", "--batch-size", "2", "--steps", "1"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"error: interrupted: 4 of 6 pictures are kept in {tmp_path}\n"
    assert {path.name for path in tmp_path.iterdir()} == {*(f"00000-{seed}.png" for seed in range(3)), "00001-0.png"}


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta", "", "cpu:x"])
def test_a_device_that_is_not_there(device: str, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device" in refused(capsys, "sample", model_folder, "a bag", "--device", device)
    assert "--device" in refused(capsys, "evaluate", model_folder, "--device", device)


def test_a_picture_depends_on_its_own_seed_only(model_folder: Path, tmp_path: Path) -> None:
    for name, words in {"many": ["--seeds", "0-4"], "one": ["--seeds", "4", "--batch-size", "1"]}.items():
        argv = ["sample", str(model_folder), "a bag", "--steps", "2", "--out", str(tmp_path / name), *words]
        assert cli.main(argv) == 0
    pixels = [list(Image.open(tmp_path / name / "00000-4.png").tobytes()) for name in ("many", "one")]
    assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_drawn(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "32 chunks" in refused(capsys, "sample", model_folder, "a bag " * 400, "--out", out)
    assert not out.exists()


def test_no_space_left_is_exit_code_4_and_loses_nothing(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    argv = ["sample", str(model_folder), "a bag", "--steps", "1", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("diffusion_unet.checkpoint.os.fsync", full)
    assert cli.main([*argv, "--guidance-scale", "2"]) == 4
    assert "00001-0.png" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_info_tells_what_each_thing_is(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = UNet(UNetConfig.from_diffusers(TINY_UNET))
    count = f"{sum(parameter.numel() for parameter in unet.parameters()):,}"
    expected = {
        model_folder: ["kind: model folder", f"parameters {count}", "scheduler.prediction_type: v_prediction"],
        model_folder / "unet": ["kind: part of a model", "UNet2DConditionModel", f"parameters: {count}"],
        model_folder / "unet" / "config.json": ["kind: U-Net config", f"parameters: {count}"],
        model_folder / "unet" / "diffusion_pytorch_model.safetensors": ["weights of a U-Net", "cross_attention_dim: 8"],
        model_folder / "text_encoder" / "model.safetensors": ["weights of a text encoder"],
        ROOT / "configs" / "quickstart.yaml": ["kind: training config"],
        ROOT / "configs" / "sd15.json": ["parameters: 859,520,964"],
    }
    for path, words in expected.items():
        assert cli.main(["info", str(path)]) == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words), (path, printed)


def test_info_refuses_pickles_and_damage(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    assert "pickle" in refused(capsys, "info", pickle)
    assert not Path("executed").exists()
    whole = (model_folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    files = {
        "cut.safetensors": whole[:-10],
        "head.safetensors": whole[:6],
        "no.png": b"no picture",
        "list.json": b"[1]",
        "deep.yaml": b"[" * 5000,
        "other.json": b'{"a": 1}',
        "what.txt": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert name in refused(capsys, "info", tmp_path / name)
    assert str(tmp_path) in refused(capsys, "info", tmp_path)


def test_info_reads_configs_as_train_does_and_names_what_it_ignores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = "\n".join([f"{key}: {json.dumps(value)}" for key, value in TINY_UNET.items()] + ["norm_eps: 1e-5"])
    (tmp_path / "unet.yaml").write_text(yaml)
    assert cli.main(["info", str(tmp_path / "unet.yaml")]) == 0
    plain = capsys.readouterr().out
    extra = {"_class_name": "UNet2DConditionModel", "decay": 0.9999, "inv_gamma": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(TINY_UNET | extra))
    assert cli.main(["info", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == plain + "ignored keys: decay, inv_gamma\n"
    (tmp_path / "unet.yaml").write_text(yaml + "\ndecay: 1")  # one's own
    assert "decay" in refused(capsys, "info", tmp_path / "unet.yaml")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [10_000, 50_000])
def test_info_decodes_no_bomb(side: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    if side == 50_000:
        assert "too many pixels" in refused(capsys, "info", path)
    else:  # PIL warns of these
        assert cli.main(["info", str(path)]) == 0
        assert "10000x10000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [4 * 10**12, 4 * 10**12]},
        {"block_out_channels": [4 * 10**30, 4 * 10**30]},
        {"layers_per_block": 10**9},
        {"transformer_layers_per_block": [1, 10**9]},
        {"conv_in_kernel": 10**15 + 1},
        {"cross_attention_dim": 10**25},
    ],
)
def test_info_refuses_sizes_that_cannot_be(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_UNET | changes))
    refused(capsys, "info", tmp_path / "config.json")


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b.json", "configs/sd15.json/x"])
def test_info_refuses_paths_that_cannot_be(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert "\0" not in refused(capsys, "info", path)


def test_info_does_not_let_a_file_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusion_unet.images import save_png

    save_png(tmp_path / "a.png", Image.new("L", (2, 2)), {"prompt": "\x1b]0;title\x07\n\u202ekind"})
    assert cli.main(["info", str(tmp_path / "a.png")]) == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(capsys.readouterr().out)


# --- evaluate


def test_a_score_draws_each_picture_with_its_own_wording_and_seed_in_few_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from training import evaluate, fashion

    calls: list[list[tuple[str, int]]] = []

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        calls.append(list(zip(prompts, seeds, strict=True)))
        return [Image.new("L", (28, 28))] * len(prompts)

    seen: list[list[int]] = []
    monkeypatch.setattr(evaluate, "prompt_accuracy", lambda images, labels, _: seen.append(list(labels)) or 0.5)
    scores = evaluate.score_fashion(draw, 12)
    assert scores["images_per_class"] == 12 and len(calls) == 2 and len(seen) == 3
    for call, labels, captions in zip(calls, seen, (fashion.captions, fashion.held_out_captions), strict=False):
        assert len(call) == len(labels) == 120
        wordings = min(len(captions(label)) for label in range(10))
        expected = {(captions(label)[i % wordings], i) for label in range(10) for i in range(12)}
        assert set(call) == expected and all(
            prompt in captions(label) for (prompt, _), label in zip(call, labels, strict=True)
        )


def test_clothing_that_the_model_cannot_be_asked_for() -> None:
    from training import evaluate

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        raise InputError("the prompt is too long")

    with pytest.raises(InputError, match=r"^the prompt is too long \(.* give --prompts for other models\)$"):
        evaluate.score_fashion(draw, 1)
