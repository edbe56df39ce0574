"""Nothing of what a folder from a stranger holds is run: canaries in everything, Python's own audit hooks as witness.

In a child process every event that could be code of theirs is recorded (PEP 578): exec and compile of files or texts of
the opened folders, imports from them, unpickling, processes, sockets, and files written elsewhere than allowed.
"""

import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_pipelines as tiny
import torch
from tiny_run import UNET, image_folder
from transformers import CLIPConfig, CLIPModel

from diffusion_unet.clip import save_tokenizer
from diffusion_unet.images import save_png
from diffusion_unet.single_file import write_single_file
from training import checkpoint

ROOT = Path(__file__).resolve().parent.parent

# Code objects of the libraries' own making (dataclasses, templates) are let pass: they hold no canary.
HOOK = """
import json, os, sys

folder, allowed, seen = sys.argv[1], sys.argv[2], []
PROCESSES = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen")
SOCKETS = ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def theirs(name):
    if not isinstance(name, (str, bytes)) or os.fsdecode(name).startswith("<"):  # <string>, <frozen ...>
        return False
    return os.path.abspath(os.fsdecode(name)).startswith(folder)

def sings(*things):
    return any("canary" in repr(thing).lower() for thing in things)

def foreign(event, arguments):
    if event == "exec":
        code = arguments[0]
        if code.co_filename == "<scenario>":
            return False
        return theirs(code.co_filename) or sings(code.co_filename, code.co_names, code.co_consts)
    if event == "compile":
        return theirs(arguments[1]) or sings(*arguments)
    if event == "import":
        return theirs(arguments[1]) or sings(arguments[0])
    if event == "open":
        path, flags = arguments[0], arguments[2]
        if not flags & WRITES or not isinstance(path, (str, bytes)) or os.fsdecode(path) == os.devnull:
            return False
        return not os.path.abspath(os.fsdecode(path)).startswith(allowed)
    if event == "subprocess.Popen" and arguments[1] == [sys.executable, "-P", "-m", "training.decoder"]:
        return False  # our own, for pictures; they are decoded below without it, too
    return event == "pickle.find_class" or event in PROCESSES or event in SOCKETS

def hook(event, arguments):
    if foreign(event, arguments):
        seen.append([event, repr(arguments)[:200]])
"""


# --- what is laid out


class Canary:
    """Unpickled, it sings."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import builtins; builtins.CANARY = True",)


def sing(folder: Path) -> None:
    """Lays out canaries beside the files of a folder: pickles under every usual name, modules, and packages."""
    data = pickle.dumps(Canary())
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "optimizer.pt", "x.pkl",
                 "scheduler.bin", "random_states_0.pkl", "training_args.bin"):  # fmt: skip
        (folder / name).write_bytes(data)
    torch.save({"a": Canary()}, folder / "weights.pth")
    np.save(folder / "array.npy", np.array([Canary()], dtype=object), allow_pickle=True)
    for name in ("canary", "modeling_canary", "pipeline", "unet", "dataset", "__init__", "conftest"):
        (folder / f"{name}.py").write_text("import builtins\nbuiltins.CANARY = True\n")


def tempt(path: Path, **more: Any) -> None:
    """Adds keys to a config that name code."""
    tempting = {
        "auto_map": {name: "canary.Canary" for name in ("AutoModel", "AutoConfig", "AutoTokenizer", "AutoPipeline")},
        "trust_remote_code": True,
        "custom_pipeline": str(path.parent),
        "attn_implementation": "canary/kernels",
        "_attn_implementation": "canary/kernels",
        "_canary": "canary.Canary",
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **tempting, **more}))


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders of every kind, all of which are whole and hold canaries."""
    folder = tmp_path_factory.mktemp("strange")
    tiny_models.save_sd1(folder / "sd1")
    tiny_models.save_sdxl(folder / "xl")
    write_single_file(folder / "sd1", folder / "single" / "model.safetensors")
    _clip(folder / "clip")
    weights = {"model": {"conv_in.weight": torch.ones(2)}}
    names = {"optimizer": "canary.Canary", "lr_scheduler": "canary:Canary"}
    checkpoint.save(folder / "run", 3, {"config": {"optimizer": names, "model": {}}, "seconds": 1.0}, weights, None)
    image_folder(folder / "images", 4)
    _sets(folder)
    record = {"prompt": "a", "solver": "canary:Canary", "model": "canary", "steps": 2}
    save_png(folder / "picture.png", tiny_models.picture(0), record)
    for path in [*folder.glob("*/config.json"), *folder.glob("*/*/*config.json"), *folder.glob("*/model_index.json")]:
        tempt(path)
    for model in ("sd1", "xl"):
        tempt(folder / model / "tokenizer" / "tokenizer_config.json", init_inputs=["canary"], vocab_file="/etc/passwd",
              fast_tokenizer_files=["tokenizer.canary.json"], chat_template="{{ CANARY }}",
              tokenizer_file="../canary.json", gguf_file="canary.gguf")  # fmt: skip
        tempt(folder / model / "model_index.json", canary=["canary", "Canary"], safety_checker=["canary", "Canary"],
              feature_extractor=["modeling_canary", "Canary"])  # fmt: skip
    shutil.copytree(folder / "table", folder / "scripted")
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sing(place)
    (folder / "scripted" / "scripted.py").write_text("import builtins\nbuiltins.CANARY = True\n")
    return folder


def _clip(folder: Path) -> None:
    words, common = tiny.tokenizer(), {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = {**common, "num_attention_heads": 2, "vocab_size": len(words), "max_position_embeddings": 8}
    sight = {**common, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=4)).save_pretrained(folder)
    save_tokenizer(words, folder)
    settings = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "canary.Canary"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **numbers}))


def _sets(folder: Path) -> None:
    """Data sets: a folder with a loading script, tars with pickles among their members, parquet files."""
    (folder / "images" / "dataset_infos.json").write_text('{"default": {"builder_name": "canary"}}')
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "00000.tar", "w") as tar:
        for name, data in {
            "0.png": tiny_models.png(0), "0.txt": b"a bag", "0.pkl": pickle.dumps(Canary()), "0.pyd": b"import CANARY",
            "0.pth": pickle.dumps(Canary()), "0.npy": b"\x93NUMPY",
        }.items():  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    tiny_models.parquet(folder / "table", "image", caption="text")
    (folder / "table" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  script: canary.py\n---\n")


# --- what is done with it

# All imports are done before anybody listens; then a process of its own for each scenario.
PROGRAM = """
import builtins, traceback
import diffusers, transformers, datasets, pyarrow.parquet, torch, yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, DDIMScheduler
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from pathlib import Path
import training
from diffusion_unet import info
from diffusion_unet.errors import InputError
from diffusion_unet.images import open_image
from diffusion_unet.model import DiffusionModel
from diffusion_unet.unet import UNet
from training import checkpoint
from training.config import DataConfig, load_config
from training.features import Clip
from training.sources import open_source

os.chdir(folder)
for name, text in json.loads(sys.argv[3]).items():
    code = compile(text, "<scenario>", "exec")
    if os.fork() == 0:
        said, failed = [], None
        sys.addaudithook(hook)
        try:
            exec(code, {**globals(), "name": name})
        except BaseException:
            failed = traceback.format_exc()
        result = {"events": seen, "said": said, "sang": getattr(builtins, "CANARY", False), "failed": failed}
        Path(allowed, f"{name}.json").write_text(json.dumps(result))
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def witnessed(strange: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What happened in each scenario: events that should not be, and what it noted down itself."""
    allowed = tmp_path_factory.mktemp("allowed")
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(allowed), "TMPDIR": str(allowed), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    scenarios = {"read": READ, "train": TRAIN, "controls": controls(), "stock": STOCK}
    arguments = ["-c", HOOK + PROGRAM, str(strange), str(allowed), json.dumps(scenarios)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: json.loads((allowed / f"{name}.json").read_text()) for name in scenarios}
    for name, result in found.items():
        assert not result["failed"], f"{name}: {result['failed']}"
        assert not result["sang"], name
    return found


READ = """
here = Path(folder)
for name in ("sd1", "xl"):
    model = DiffusionModel.load(here / name)
    model.text.encode(["a red boot"])
    UNet.from_pretrained(here / name, subfolder="unet")
DiffusionModel.load(here / "single" / "model.safetensors", config=here / "sd1")
Clip.load(here / "clip").images([open_image(here / "picture.png")])
found = checkpoint.load(here / "run")
assert found.state["config"]["optimizer"]["optimizer"] == "canary.Canary"
for path in (here / "sd1", here / "xl" / "unet", here / "run", here / "picture.png"):
    info.describe(path)
for path in sorted(here.glob("*/*.png")):
    open_image(path)
count = 0
for name in ("images", "tars", "table"):
    source = open_source(DataConfig(train_data_dir=str(here / name), resolution=8), 3)
    for index in range(len(source)):
        assert source.captions(index) and source.image(index)
        count += 1
assert count == 11, count
try:
    open_source(DataConfig(train_data_dir=str(here / "scripted"), resolution=8), 3)
except InputError as error:
    assert "scripts" in str(error)
else:
    raise AssertionError("a loading script")
for name in ("model.ckpt", "weights.pth", "x.pkl", "pytorch_model.bin"):
    for read in (info.describe, DiffusionModel.load):
        try:
            read(here / name)
        except InputError as error:
            assert "\\n" not in str(error)
        else:
            raise AssertionError(name)
"""


# The optimizer and the noise distribution are those of the user's own config, whatever a state.json says.
TRAIN = f"""
run = Path(allowed) / "mine" / "run"
settings = dict(model=dict(unet={UNET!r}, text_encoder=dict(hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2), tokenizer=dict(vocab_size=560, max_length=8), schedule=dict(kind="cosine")),
    data=dict(train_data_dir=str(Path(folder) / "images"), resolution=8),
    train=dict(output_dir=str(run), max_train_steps=1, train_batch_size=2))
run.parent.mkdir()
(run.parent / "config.yaml").write_text(yaml.safe_dump(settings))
config = load_config(run.parent / "config.yaml")
training.train(config, preview=None)
found = checkpoint.load(run)
state = {{**found.state, "look_due": True}}
state["config"]["optimizer"]["optimizer"] = "canary.Canary"
state["config"]["objective"]["noise_distribution"] = "canary:Canary"
state.pop("format"), state.pop("step")
checkpoint.save(run, 1, state, found.tensors, None)
for go_on in (lambda: training.train(config, preview=None), lambda: training.export(run, Path(allowed) / "out")):
    try:
        go_on()
    except InputError as error:
        said.append(str(error))
    else:
        said.append("done")
"""

# Each thing that is looked for, done on purpose.
CONTROLS = {
    "pickle.find_class": "import pickle; pickle.load(open('x.pkl', 'rb')); del builtins.CANARY",
    "import": "sys.path.insert(0, folder); import modeling_canary; del builtins.CANARY",
    "exec": "exec(compile(Path('canary.py').read_text(), 'canary.py', 'exec'), {}); del builtins.CANARY",
    "compile": "compile(Path('canary.py').read_text(), '<string>', 'exec')",
    "os.system": "os.system('true')",
    "subprocess.Popen": "import subprocess; subprocess.run(['true'])",
    "socket.connect": "import socket; s = socket.socket(); s.settimeout(0.1); s.connect_ex(('127.0.0.1', 9))",
    "open": "open(os.path.join(folder, 'new'), 'w').close(); os.unlink(os.path.join(folder, 'new'))",
}
STOCK = "torch.load('sd1/unet/weights.pth', weights_only=False); assert builtins.CANARY; del builtins.CANARY"


def controls() -> str:
    tell = "said.append([{!r}, [event for event, _ in seen]]); del seen[:]"
    return "\n".join(f"{line}\n{tell.format(name)}" for name, line in CONTROLS.items())


Results = dict[str, dict[str, Any]]


def test_nothing_of_a_stranger_is_run(witnessed: Results) -> None:
    assert witnessed["read"]["events"] == []


def test_a_checkpoint_names_no_code(witnessed: Results) -> None:
    """Training has processes of its own, which is why only what speaks of a canary, or unpickles, is looked at."""
    heard = [event for event in witnessed["train"]["events"] if "canary" in str(event) or event[0].startswith("pickle")]
    assert heard == []
    assert "optimizer.optimizer" in witnessed["train"]["said"][0], witnessed["train"]["said"]


def test_the_witness_hears_what_is_run(witnessed: Results) -> None:
    assert [name for name, events in witnessed["controls"]["said"] if name in events] == list(CONTROLS)


def test_the_canaries_sing_where_they_are_trusted(witnessed: Results) -> None:
    """The layout is no scarecrow: torch's reader, told to trust, runs the pickle that lies beside the weights."""
    assert "pickle.find_class" in [event for event, _ in witnessed["stock"]["events"]]
