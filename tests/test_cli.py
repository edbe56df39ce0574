"""The command line: one-line errors and their exit codes, quick help, pictures with their record, what `info` says."""

import errno
import json
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_unet import cli
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
        arguments = cli._parse(shlex.split(command))
        assert arguments.run is cli.VERBS[verb].run
        if verb in ("train", "quickstart"):
            config = getattr(arguments, "config", cli.CONFIGS / "quickstart.yaml")
            assert load_config(config, ["--train.output_dir=x", *arguments.overrides]).train.output_dir


def test_train_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from training.config import settings

    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{setting.key}=" in printed for setting in settings() if setting.type)


def test_the_solvers_are_those_of_sampling() -> None:
    from sampling.solvers import SOLVERS

    assert set(cli.SOLVERS) == set(SOLVERS)


# --- errors


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian x", "unknown verb trian: did you mean train?"),
        ("frobnicate", "the verbs are quickstart, train"),
        ("sample", "MODEL"),
        ("sample m a --step 3", "unknown argument --step: did you mean --steps?"),
        ("sample m a --steps 0", "'0' is no whole number from 1"),
        ("sample m a --steps many", "argument --steps"),
        ("sample m a --seeds 7-0", "0-7 or 0,3"),
        ("sample m a --seeds 1,1", "twice"),
        ("sample m a --seeds 18446744073709551616", "2**64 - 1"),
        ("sample m a --size 32", "512x768"),
        ("sample m a --size 0x32", "512x768"),
        ("sample m a --guidance-scale nan", "no finite number"),
        ("sample m a --solver euler", "--solver"),
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
    for error in (ZeroDivisionError(), OSError(errno.EIO, "Input/output error")):
        monkeypatch.setitem(cli.VERBS, "info", cli.VERBS["info"]._replace(run=raising(error)))
        with pytest.raises(type(error)):
            cli.main(["info", "x"])


def test_the_process_ends_with_the_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_unet", "info", "no/thing"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


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
    assert "12" in refused(capsys, "sample", model_folder, "a bag " * 40, "--out", out)
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
    assert "00000-0.png" in capsys.readouterr().err
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


def test_info_does_not_let_a_file_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusion_unet.images import save_png

    save_png(tmp_path / "a.png", Image.new("L", (2, 2)), {"prompt": "\x1b]0;title\x07\n\u202ekind"})
    assert cli.main(["info", str(tmp_path / "a.png")]) == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(capsys.readouterr().out)
