"""Resumes of a run of which something has changed: refused in one line that names it, or allowed by name and recorded.

    python benchmarks/reliability/wrong_resumes.py

Settings are changed on the command line; images, captions, the model and the files of the checkpoint on the disk, the
latter with a manifest that fits them: a copy from another run, not a damaged one. Each time: exit code 2, one line of
error that names the field or the file, and a run folder whose checkpoints and metrics are as they were.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    Result,
    Tiny,
    Trials,
    content,
    edit_tensors,
    make_tiny,
    newest,
    parser,
    settle,
    workplace,
    write_manifest,
)
from forks import Forks
from kill_at_syscalls import chosen
from PIL import Image

BAD_INPUT = 2
UNET = "unet/diffusion_pytorch_model.safetensors"
TAKEN, STEPS = 2, 4  # optimizer steps before the resume, and with it

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """What is changed, and the words of which the error must have all. `images`, `run`: changes of these folders."""

    name: str
    words: Sequence[str]
    overrides: Sequence[str] = ()
    images: Change | None = None
    run: Change | None = None
    tuned: bool = False  # of the run that tunes a pretrained model
    model: Change | None = None  # of the pretrained model


NO_AVERAGE = Case("no average", ["train.ema"], ["--train.ema=[]"])


def settings() -> list[Case]:
    """Each one that decides what is trained."""
    values = {
        "model.unet.layers_per_block": "2",
        "model.unet.block_out_channels": "[8, 24]",
        "model.unet.attention_head_dim": "4",
        "model.unet.norm_num_groups": "8",
        "model.unet.down_block_types": "[CrossAttnDownBlock2D, CrossAttnDownBlock2D]",
        "model.unet.resnet_time_scale_shift": "scale_shift",
        "model.task": "inpaint --validation.validation_prompts=[]",
        "model.train_text_encoder": "true --data.cache_text=false",
        "model.schedule.kind": "cosine",
        "model.schedule.prediction_type": "epsilon",
        "model.schedule.num_train_timesteps": "500",
        "model.schedule.beta_end": "0.02",
        "data.resolution": "8",
        "data.random_flip": "false",
        "data.center_crop": "true --data.cache_crops=1",
        "data.caption_dropout": "0.5",
        "data.held_out": "3",
        "data.background": "black",
        "data.cache_crops": "1",
        "data.shuffle_tags": "true --data.cache_text=false",
        "objective.noise_distribution": "uniform",
        "objective.ln_sigma_mean": "0.0",
        "objective.stratified": "false",
        "objective.weighting": "min_snr",
        "objective.loss": "huber",
        "objective.noise_offset": "0.1",
        "optimizer.learning_rate": "0.002",
        "optimizer.optimizer": "torch.optim:SGD",
        "optimizer.adam_beta2": "0.99",
        "optimizer.lr_scheduler": "linear",
        "optimizer.max_grad_norm": "0.5",
        "train.seed": "1",
        "train.train_batch_size": "4",
        "train.ema": "[0.99,0.999]",
        "train.mixed_precision": "bf16",
        "train.max_train_steps": "1",
    }
    # What stands behind a value is another setting, without which the two would contradict each other.
    given = {key: f"--{key}={value}".replace(", ", ",").split() for key, value in values.items()}
    return [*(Case(key, [key], overrides) for key, overrides in given.items()), NO_AVERAGE]


def rewrite_captions(change: Callable[[list[Result]], Any]) -> Change:
    def apply(images: Path) -> None:
        path = images / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return apply


def remove_image(images: Path) -> None:
    rewrite_captions(lambda rows: rows.pop(3))(images)
    (images / "03.png").unlink()


def add_image(images: Path) -> None:
    Image.new("RGB", (20, 16), "pink").save(images / "more.png")
    rewrite_captions(lambda rows: rows.append({"file_name": "more.png", "text": "pink"}))(images)


def paint_pixel(images: Path) -> None:
    with Image.open(images / "05.png") as image:
        image.putpixel((9, 8), (1, 2, 3))
        image.save(images / "05.png")


def data() -> list[Case]:
    """Images and captions."""
    where = ["data.train_data_dir"]
    captions = rewrite_captions
    return [
        Case("an image less", where, images=remove_image),
        Case("an image more", where, images=add_image),
        Case("a pixel of an image", where, images=paint_pixel),
        Case("a caption", where, images=captions(lambda rows: rows[2].update(text="a blue thing"))),
        Case("a second caption", where, images=captions(lambda rows: rows[2].update(text=[rows[2]["text"], "blue"]))),
        Case("two captions exchanged", where, images=captions(lambda rows: rows[1]["text"].reverse())),
        Case("images in another order", where, images=captions(lambda rows: rows.reverse())),
        Case("the first ten samples only", ["data."], ["--data.max_train_samples=10"]),
    ]


def in_checkpoint(change: Change) -> Change:
    """A change of the newest checkpoint, with a manifest that fits."""

    def apply(run: Path) -> None:
        found = newest(run)
        assert found is not None
        change(found[1])
        write_manifest(found[1])

    return apply


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return in_checkpoint(lambda folder: edit_tensors(folder / f"{name}.safetensors", change))


def transpose(found: dict[str, torch.Tensor]) -> None:
    found["unet.conv_in.weight"] = found["unet.conv_in.weight"].transpose(0, 1).contiguous()


def in_state(change: Callable[[Result], Any]) -> Change:
    def apply(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        change(state)
        (folder / "state.json").write_text(json.dumps(state))

    return in_checkpoint(apply)


def files() -> list[Case]:
    """Checkpoints with files of another run in them, and another model than the run began with."""
    key = "unet.conv_in.weight"
    model, ema, moments = "model.safetensors", "ema_0.99.safetensors", "optimizer.safetensors"

    def half(found: dict[str, torch.Tensor]) -> None:
        found[key] = found[key].half()

    def other_base(run: Path) -> None:
        edit_tensors(
            run / "base/unet/diffusion_pytorch_model.safetensors", lambda found: found["conv_in.weight"].neg_()
        )

    def other_tokenizer(run: Path) -> None:
        path = run / "base/tokenizer/tokenizer.json"
        found = json.loads(path.read_text())
        vocabulary = found["model"]["vocab"]
        one, other = list(vocabulary)[300:302]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        path.write_text(json.dumps(found))

    def other_weights(folder: Path) -> None:
        edit_tensors(folder / UNET, lambda found: found["conv_in.bias"].add_(1))

    return [
        Case("no file of the average", [ema], run=in_checkpoint(lambda folder: (folder / ema).unlink())),
        Case("no file of the weights", [model], run=in_checkpoint(lambda folder: (folder / model).unlink())),
        Case("no file of the moments", ["optimizer"], run=in_checkpoint(lambda folder: (folder / moments).unlink())),
        Case("a weight less", [model, key], run=tensors("model", lambda found: found.pop(key))),
        Case("a weight more", [model, "foreign"], run=tensors("model", lambda t: t.update(foreign=torch.ones(1)))),
        Case("a weight of another shape", [model, key], run=tensors("model", transpose)),
        Case("a weight of another dtype", [model, key], run=tensors("model", half)),
        Case("an average of another dtype", [ema, key], run=tensors("ema_0.99", half)),
        Case("a moment less", ["optimizer"], run=tensors("optimizer", lambda found: found.pop(f"exp_avg.{key}"))),
        Case("moments of no weight", ["optimizer"], run=tensors("optimizer", lambda t: t.update(
            {"exp_avg.foreign": torch.ones(1)}))),
        Case("other noise levels", ["levels"], run=in_state(lambda state: state["levels"]["sums"].pop())),
        Case("no settings in the state", ["state.json", "config"], run=in_state(lambda state: state.pop("config"))),
        Case("the tokenizer of the run", ["base"], run=other_tokenizer),
        Case("the weights that the run began with", ["base"], run=other_base),
        Case("the pretrained model", ["model.pretrained"], tuned=True, model=other_weights),
    ]  # fmt: skip


def base_runs(work: Path, forks: Forks) -> tuple[Tiny, dict[bool, Path]]:
    """Two runs of some steps: of a new model, and of a pretrained one."""
    tiny = make_tiny(work / "tiny", steps=STEPS, checkpointing_steps=2)
    runs = {}
    for tuned in (False, True):
        runs[tuned] = work / ("tuned" if tuned else "new")
        command = resume(tiny, runs[tuned], tuned, [f"--train.max_train_steps={TAKEN}"])
        if forks.start(command, work / "base.log").wait():
            raise SystemExit((work / "base.log").read_text())
    return tiny, runs


def resume(tiny: Tiny, run: Path, tuned: bool, overrides: Sequence[str], model: Path | None = None) -> list[str]:
    """The command that goes on with a run."""
    if not tuned:
        return tiny.command(run, *overrides)
    none = [f"--model.{name}=null" for name in ("unet", "vae", "pretrained_text_encoder")]
    default = json.dumps({"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4})
    schedule = ["--model.schedule.kind=scaled_linear", "--model.schedule.prediction_type=null"]
    pretrained = [f"--model.pretrained={model or tiny.folder / 'told'}", f"--model.text_encoder={default}"]
    return tiny.command(run, *none, *schedule, *pretrained, *overrides)


def kept(run: Path) -> dict[str, str]:
    """The files of a run that a refused resume has no business with."""
    found = content(run)
    return {name: digest for name, digest in found.items() if name.startswith(("checkpoint-", "metrics", "base"))}


def refused(case: Case, folder: Path, tiny: Tiny, base: Path, forks: Forks) -> Result:
    """Resumes with the change of a case; what is wrong with how it is refused."""
    run = shutil.copytree(base, folder / "run")
    overrides = list(case.overrides)
    if case.images:
        case.images(shutil.copytree(tiny.images, folder / "images"))
        overrides.append(f"--data.train_data_dir={folder / 'images'}")
    if case.run:
        case.run(run)
    model = None
    if case.model:
        model = shutil.copytree(tiny.folder / "told", folder / "told")
        case.model(model)
    before = kept(run)
    process = forks.start(resume(tiny, run, case.tuned, overrides, model), folder / "log")
    code, errors = process.wait(), process.errors()
    wrong = [] if code == BAD_INPUT else [f"exit code {code}: {process.text()[-300:]}"]
    if "Traceback" in process.text() or len(errors) != 1:
        wrong.append(f"{len(errors)} lines of error: {process.text()[-300:]}")
    elif missing := [word for word in case.words if word not in errors[0].replace(str(folder), "")]:
        wrong.append(f"{missing} is not named: {errors[0]}")
    wrong += ["the run was changed"] if kept(run) != before else []
    return {"code": code, "told": errors[0].replace(str(folder), "") if errors else "", "wrong": wrong}


def allowed(
    allow: Sequence[str], overrides: Sequence[str], folder: Path, tiny: Tiny, base: Path, forks: Forks
) -> Result:
    """Resumes with a change that is allowed by name; whether the checkpoint records that and nothing else."""
    run = shutil.copytree(base, folder / "run")
    options = [word for key in allow for word in ("--allow-change", key)]
    process = forks.start([*tiny.command(run, *overrides), *options], folder / "log")
    code, found = process.wait(), newest(run)
    wrong = [] if code == 0 else [f"exit code {code}: {process.text()[-300:]}"]
    changes: list[Result] = []
    if found is None or found[0] != STEPS:
        wrong.append("it did not go on")
    else:
        changes = json.loads((found[1] / "state.json").read_text()).get("changes", [])
    recorded = [
        f"--{one['setting']}={one['to']}" for one in changes if one["step"] == TAKEN and one["from"] != one["to"]
    ]
    if recorded != list(overrides) or len(changes) != len(recorded):
        wrong.append(f"recorded is {changes}")
    return {"code": code, "recorded": changes, "wrong": wrong}


def prove(trials: Trials, work: Path, forks: Forks, n: int | None = None, only: str = "") -> None:
    """Goes through the cases, or `n` of them evenly, or those with `only` in their names."""
    tiny, runs = base_runs(work, forks)
    found = [case for case in [*settings(), *data(), *files()] if only in case.name]
    for number in chosen(len(found), n):
        case, folder = found[number], work / f"case-{number}"
        folder.mkdir()
        result = refused(case, folder, tiny, runs[case.tuned], forks)
        settle(work, folder, trials.line(not result["wrong"], changed=case.name, **result))
    rate, seed = "optimizer.learning_rate", "train.seed"
    both = [f"--{rate}=0.002", f"--{seed}=7"]
    kinds = [([rate], both[:1]), ([rate, seed], both), ([rate], [])]
    for number, (allow, overrides) in enumerate(kinds[:n]):
        folder = work / f"allowed-{number}"
        folder.mkdir()
        result = allowed(allow, overrides, folder, tiny, runs[False], forks)
        settle(work, folder, trials.line(not result["wrong"], changed=" ".join(overrides), allowed=allow, **result))
    mixed = Case("allowed, and more", [seed], [*both, "--allow-change", rate])
    (work / "mixed").mkdir()
    result = refused(mixed, work / "mixed", tiny, runs[False], forks)
    settle(work, work / "mixed", trials.line(not result["wrong"], changed=mixed.name, **result))


def main(options: argparse.Namespace) -> int:
    trials = Trials("wrong_resumes")
    with workplace(options.work) as work, Forks() as forks:
        prove(trials, work, forks, options.n, options.only)
    return trials.summary()


if __name__ == "__main__":
    made = parser(__doc__, None)
    made.add_argument("--only", default="", help="cases whose name has this in it")
    sys.exit(main(made.parse_args()))
