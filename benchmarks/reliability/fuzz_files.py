"""Mutated files of every kind that comes from strangers: each is loaded, or refused in one line; nothing else happens.

    python benchmarks/reliability/fuzz_files.py --n 100000 --seed 0

A file is broken (breaking.py) as bytes, as JSON or as a safetensors header, and its folder is then read in a forked
process that may take 1 GB more than it begins with. A fault is any other error than InputError, a message of several
lines, a weight without a value, 5 seconds of the processor, a process that ends, and what the reader of a tokenizer
prints when it panics. Faulty files are kept.
"""

import argparse
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from breaking import break_file
from common import Trials, machine, make_images, parser, workplace
from forks import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from diffusion_unet import info, untrusted  # noqa: E402
from diffusion_unet.checkpoint import read_safetensors  # noqa: E402
from diffusion_unet.clip import load_model, load_tokenizer, save_tokenizer  # noqa: E402
from diffusion_unet.codec import LatentCodec, PixelCodec  # noqa: E402
from diffusion_unet.conditioning import new_text_encoder, train_tokenizer  # noqa: E402
from diffusion_unet.config import UNetConfig  # noqa: E402
from diffusion_unet.errors import InputError  # noqa: E402
from diffusion_unet.images import open_image, save_png  # noqa: E402
from diffusion_unet.model import DiffusionModel  # noqa: E402
from diffusion_unet.schedule import NoiseSchedule  # noqa: E402
from diffusion_unet.single_file import write_single_file  # noqa: E402
from diffusion_unet.unet import UNet  # noqa: E402
from sampling.levels import sigmas  # noqa: E402
from training import checkpoint  # noqa: E402
from training.config import DataConfig  # noqa: E402
from training.features import Clip  # noqa: E402
from training.sources import open_source  # noqa: E402

SECONDS, STUCK, MEMORY, BATCH = 5.0, 60.0, 1 << 30, 200
UNET = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 8, "attention_head_dim": 2, "sample_size": 8,
}  # fmt: skip


class Group(NamedTuple):
    """Files of one kind: where they lie, which of them are broken (patterns), and how the folder is read."""

    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]


# ---- whole files


def make_corpus(folder: Path) -> None:
    """One small folder of each kind, as this project, diffusers and transformers write them."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red boot", "a blue bag"], 514, 8)
    text = new_text_encoder(tokenizer, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    schedule = NoiseSchedule.cosine(T=50, prediction_type="v_prediction")
    unet = UNet(UNetConfig.from_diffusers(UNET))
    DiffusionModel(unet, schedule, text, PixelCodec(3)).save(folder / "pixels")
    tiny_models.save_sd1(folder / "sd1")
    tiny_models.save_sdxl(folder / "xl")
    (folder / "single").mkdir()
    write_single_file(folder / "sd1", folder / "single" / "model.safetensors")
    tiny_models.without_weights(folder / "sd1", folder / "single" / "configs")
    old = folder / "old" / "tokenizer"
    save_tokenizer(tokenizer, old)
    (old / "tokenizer.json").unlink()
    (old / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!", "eos_token": "<|endoftext|>"}))
    _sharded(unet, folder / "sharded")
    schedules = {"flow": NoiseSchedule.flow(), "edm": NoiseSchedule.edm(), "linear": NoiseSchedule.linear(50)}
    (folder / "schedules").mkdir()
    for name, made in schedules.items():
        (folder / "schedules" / f"{name}.json").write_text(json.dumps(made.to_config()))
    weights = {"conv_in.weight": torch.ones(4, 3, 3, 3), "b": torch.zeros(0), "c": torch.ones(2, dtype=torch.float16)}
    state = {
        "seconds": 1.5, "look_due": True, "levels": {"sums": [0.5], "counts": [1.0]}, "optimizer": {"step.b": 3},
        "config": {"model": {}}, "changes": [], "data": "ab", "model": "cd", "scaler": None,
    }  # fmt: skip
    checkpoint.save(folder / "run", 3, state, {"model": weights, "ema_0.9": weights, "optimizer": weights}, None)
    lora = {"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(4, 2)}
    (folder / "lora").mkdir()
    save_file(lora, folder / "lora" / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": '{"unet.r": 2}'})
    _clip(folder / "clip", tokenizer)
    _data(folder)
    config = {"model": {"unet": UNET}, "data": {"resolution": 8}}
    (folder / "config").mkdir()
    (folder / "config" / "run.yaml").write_text(json.dumps(config, indent=1))
    (folder / "config" / "unet.json").write_text(json.dumps(UNET))


def _sharded(unet: UNet, folder: Path) -> None:
    unet.save_pretrained(folder)
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = read_safetensors(whole)
    files = {key: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in set(files.values()):
        save_file({key: tensors[key].clone() for key in tensors if files[key] == name}, folder / name)
    whole.with_name(whole.name + ".index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    whole.unlink()


def _clip(folder: Path, tokenizer: Any) -> None:
    from transformers import CLIPConfig, CLIPModel

    common = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    numbers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    words = {**common, **numbers, "vocab_size": len(tokenizer), "max_position_embeddings": 8}
    sight = {**common, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=words, vision_config=sight, projection_dim=4)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    settings = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "resample": 3}
    numbers = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **numbers}))


def _data(folder: Path) -> None:
    make_images(folder / "jsonl", 3)
    names = sorted(path.name for path in (folder / "jsonl").glob("*.png"))
    shutil.copytree(folder / "jsonl", folder / "csv", ignore=shutil.ignore_patterns("*.jsonl"))
    (folder / "csv" / "metadata.csv").write_text("file_name,text\n" + "".join(f'{name},"a, b"\n' for name in names))
    (folder / "tar").mkdir()
    with tarfile.open(folder / "tar" / "00000.tar", "w") as tar:
        for number, name in enumerate(names):
            for end, content in ((".png", (folder / "jsonl" / name).read_bytes()), (".json", b'{"caption": "a bag"}')):
                entry = tarfile.TarInfo(f"{number:05d}{end}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    tiny_models.parquet(folder / "parquet", "image", caption="text")
    record = {"prompt": "a bag", "seed": 1, "steps": 2, "solver": "ddim", "size": None, "model_hash": "ab" * 32}
    save_png(folder / "record" / "a.png", tiny_models.picture(0), record)


# ---- what is read of them


def _module(module: Any) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    assert not any(tensor.is_meta for tensor in tensors), "a weight has no value"


def _model(folder: Path) -> None:
    model = DiffusionModel.load(folder)
    for part in (model.unet, model.text, getattr(model.codec, "vae", None)):
        if part is not None:
            _module(part)
    sigmas(model.schedule, 4)
    if model.text is not None:
        model.text.tokenize(["a bag", ""])


def _tokenizer(folder: Path) -> None:
    load_tokenizer(folder)(["a bag", "", "<|startoftext|> \u00e9\u4e2d" * 3])


def _data_set(folder: Path) -> None:
    source = open_source(DataConfig(train_data_dir=str(folder), resolution=8), 3)
    for index in range(min(len(source), 4)):
        try:  # one bad sample is set apart
            source.captions(index)
            source.image(index)
        except InputError as error:
            _one_line(error)


def _run(folder: Path) -> None:
    found = checkpoint.load(folder, say=lambda line: None)
    if found is not None:
        checkpoint.check_state(found)
    info.describe(folder)


def _picture(folder: Path) -> None:
    info.describe(folder / "a.png")
    open_image(folder / "a.png")


def _every(pattern: str, read: Callable[[Path], Any]) -> Callable[[Path], None]:
    def reader(folder: Path) -> None:
        for path in sorted(folder.glob(pattern)):
            read(path)

    return reader


def _single(folder: Path) -> None:
    _module(DiffusionModel.load(folder / "model.safetensors", config=folder / "configs").unet)


def _schedule(path: Path) -> None:
    sigmas(NoiseSchedule.from_config(untrusted.read_json(path)), 4)


WEIGHTS, JSON = "*.safetensors", "*.json"
GROUPS = {
    "header": Group("lora", (WEIGHTS,), _every(WEIGHTS, read_safetensors)),
    "unet": Group("pixels", (f"unet/{WEIGHTS}", "unet/*.json"), lambda at: _module(UNet.from_pretrained(at / "unet"))),
    "sharded": Group("sharded", (WEIGHTS, "*.index.json"), lambda at: _module(UNet.from_pretrained(at))),
    "text encoder": Group("pixels", ("text_encoder/*",), lambda at: _module(load_model(at / "text_encoder", None))),
    "tokenizer": Group("pixels", ("tokenizer/tokenizer*.json",), lambda at: _tokenizer(at / "tokenizer")),
    "tokenizer of 2022": Group("old", ("tokenizer/*",), lambda at: _tokenizer(at / "tokenizer")),
    "autoencoder": Group("sd1", ("vae/*",), lambda at: _module(LatentCodec.load(at / "vae").vae)),
    "scheduler": Group("schedules", (JSON,), _every(JSON, _schedule)),
    "model": Group("pixels", ("*.json", "*/*.json", "*/*.safetensors"), _model),
    "latent model": Group("sd1", ("*.json", "*/*.json", "*/*.safetensors"), _model),
    "xl model": Group("xl", ("*.json", "*/*.json", "*/*.safetensors"), _model),
    "single file": Group("single", (WEIGHTS, "configs/*.json", "configs/*/*.json"), _single),
    "checkpoint": Group("run", ("checkpoint-3/*",), _run),
    "lora": Group("lora", (WEIGHTS,), info.describe),
    "clip": Group("clip", ("*",), Clip.load),
    "info": Group("sd1", ("*.json", "*/*.json", "*/*.safetensors"), info.describe),
    "config": Group("config", ("*",), _every("*", info.describe)),
    "record": Group("record", ("a.png",), _picture),
    "metadata.jsonl": Group("jsonl", ("*.jsonl",), _data_set),
    "metadata.csv": Group("csv", ("*.csv",), _data_set),
    "tar": Group("tar", ("*.tar",), _data_set),
    "parquet": Group("parquet", ("*.parquet",), _data_set),
}
SLOW = {"single file": 0.2, "parquet": 0.3, "tar": 0.5, "metadata.jsonl": 0.5, "metadata.csv": 0.5, "xl model": 0.4}


# ---- one file, and many


def sign(folder: Path) -> None:
    """Manifests that agree with the files beside them, so that these are looked at."""
    for manifest in folder.glob("*/manifest.json"):
        files = [path for path in manifest.parent.iterdir() if path != manifest]
        told = {path.name: {"bytes": path.stat().st_size, "sha256": checkpoint._digest(path)} for path in files}
        manifest.write_text(json.dumps({"format": checkpoint.FORMAT, "files": told}))


def _one_line(error: InputError) -> None:
    text = str(error)
    assert "\n" not in text and "\r" not in text and len(text) < 6000, f"no single line: {text[:300]!a}"


def attempt(group: Group, folder: Path) -> str:
    """What became of it: "loaded", "refused", or a fault and where."""
    start = time.process_time()
    try:
        group.read(folder)
        outcome = "loaded"
    except InputError as error:
        outcome = "refused"
        try:
            _one_line(error)
        except AssertionError as fault:
            outcome = str(fault)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(last))
        outcome = f"{type(error).__name__}: {str(error)[:200]!a} at {where}"
    seconds = time.process_time() - start
    return outcome if seconds < SECONDS else f"took {seconds:.1f} s ({outcome})"


def case(name: str, corpus: Path, work: Path, seed: int, number: int) -> Path:
    """The folder of one case, broken: the same for the same seed and number."""
    group, chance = GROUPS[name], random.Random(f"{seed}/{name}/{number}")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(corpus / group.folder, work)
    files = sorted({path for pattern in group.files for path in work.glob(pattern) if path.is_file()})
    for path in {chance.choice(files) for _ in range(chance.choice((1, 1, 1, 2)))}:
        break_file(path, chance)
    if name == "checkpoint" and chance.random() < 0.7:
        sign(work)
    return work


def _child(name: str, corpus: Path, work: Path, seed: int, numbers: range, pipe: int) -> None:
    """Writes a line for each case before and after it."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    said = work.with_suffix(".stderr")
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    for number in numbers:
        folder = case(name, corpus, work, seed, number)
        os.write(pipe, f"{number}\tends the process\n".encode())
        outcome = attempt(GROUPS[name], folder)
        if "panicked at" in said.read_text(errors="replace"):
            outcome = f"panicked ({outcome})"
            os.truncate(said, 0)
        os.write(pipe, f"{number}\t{' '.join(outcome.split())}\n".encode())


def run_group(name: str, corpus: Path, work: Path, seed: int, count: int) -> dict[int, str]:
    """The outcome of every case."""
    found: dict[int, str] = {}
    while (done := len(found)) < count:
        numbers = range(done, min(done + BATCH, count))
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reading)
                _child(name, corpus, work, seed, numbers, writing)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as lines:
            while True:
                if not select.select([lines], [], [], STUCK)[0]:
                    os.kill(pid, signal.SIGKILL)
                    found[max(found, default=0)] = f"stuck for {STUCK:g} s"
                    break
                if not (line := lines.readline()):
                    break
                number, _, outcome = line.rstrip("\n").partition("\t")
                found[int(number)] = outcome
        os.waitpid(pid, 0)
        if len(found) == done:
            raise RuntimeError(f"{name}, case {done}: could not be made; see {work.with_suffix('.stderr')}")
    return found


def shares(total: int) -> dict[str, int]:
    """How many of the files each group gets; fewer where one takes long to read."""
    weights = {name: SLOW.get(name, 1.0) for name in GROUPS}
    return {name: max(1, round(total * weight / sum(weights.values()))) for name, weight in weights.items()}


def main(options: argparse.Namespace) -> int:
    trials, total = Trials("fuzz files"), Counter[str]()
    with workplace(options.work) as work:
        if not (work / "corpus").exists():
            make_corpus(work / "corpus")
        for name, count in shares(options.n).items():
            if options.group and name not in options.group:
                continue
            whole, start = attempt(GROUPS[name], work / "corpus" / GROUPS[name].folder), time.monotonic()
            assert whole == "loaded", f"{name}, not broken at all: {whole}"
            found = run_group(name, work / "corpus", work / "case", options.seed, count)
            faults = {number: text for number, text in found.items() if text not in ("loaded", "refused")}
            for number in list(faults)[:20]:
                case(name, work / "corpus", work / f"failed-{name.replace(' ', '-')}-{number}", options.seed, number)
            told = Counter("fault" if number in faults else text for number, text in found.items())
            total += told
            facts = {"group": name, "files": len(found), **told, "seconds": round(time.monotonic() - start)}
            shown = {number: f"{text[:160]} ... {text[-60:]}" for number, text in list(faults.items())[:12]}
            trials.line(not faults, **facts, faults=shown)
    facts = {"n": sum(total.values()), "failures": total["fault"], "seed": options.seed, **machine()}
    return trials.summary(**facts, loaded=total["loaded"], refused=total["refused"])


if __name__ == "__main__":
    made = parser(__doc__, 100_000)
    made.add_argument("--group", action="append", choices=[*GROUPS], help="only this kind, several times for several")
    sys.exit(main(made.parse_args()))
