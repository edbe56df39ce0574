"""The command line: `diffusion-unet VERB ...`, the one place where the library, `training` and `sampling` meet.

Every error that is meant for a person ends here as one line on stderr. Exit codes: 0 done, 2 bad input, 3 non-finite
numbers, 4 could not save, 75 told to stop and saved, 130 interrupted. torch is imported only once a verb needs it.
"""

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_unet import __version__, drawing, options, sibling
from diffusion_unet.arguments import Parser, command, nobody_reads, plain, quote, split_overrides, suggest, tell
from diffusion_unet.drawing import draw, load, settings_of
from diffusion_unet.errors import Failure, InputError, SaveError
from diffusion_unet.options import CONFIGS, find_config

if TYPE_CHECKING:
    from diffusion_unet.model import DiffusionModel
    from training.config import Config

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; `argv` is without the program's name, None takes the process's own. Returns the exit code."""
    try:
        try:
            arguments = _parse(sys.argv[1:] if argv is None else list(argv))
            arguments.run(arguments)
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except Failure as failure:
        return failure.exit_code if failure.told else tell(str(failure), failure.exit_code)
    except KeyboardInterrupt as stop:
        return tell(str(stop) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        if not nobody_reads():
            raise
    except OSError as error:
        where = error.filename or "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return tell(f"{where}: no space left: make room, and run this again", SaveError.exit_code)
        if error.errno == errno.ENAMETOOLONG:
            return tell(f"{where}: too long for a path", InputError.exit_code)
        raise
    return 0


# --- verbs


def _quickstart(arguments: argparse.Namespace) -> None:
    from diffusion_unet.quickstart import quickstart

    sibling("training")
    from training.config import load_config, to_dict

    if any(override.startswith("--train.output_dir=") for override in arguments.overrides):
        raise InputError("--train.output_dir: the quickstart puts more there than the run: give --output-dir instead")
    folder = Path(arguments.output_dir)
    config = load_config(CONFIGS / "quickstart.yaml", [f"--train.output_dir={folder}", *arguments.overrides])
    quickstart(
        folder,
        to_dict(config),
        train=lambda: _train_with_previews(config),
        export=_export_run,
        load=load,
        draw=draw,
        score=_score,
    )


def _train(arguments: argparse.Namespace) -> None:
    sibling("training")
    from training.config import load_config

    config = load_config(find_config(arguments.config), arguments.overrides)
    run = _train_with_previews(config, arguments.allow_change)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"Run: {run}. Next: {command()} export {quote(run)} {quote(run / 'model')}")


def _check(arguments: argparse.Namespace) -> None:
    sibling("training")
    from training.config import load_config

    config = load_config(find_config(arguments.config), arguments.overrides)
    from training.preflight import check

    report = check(config, progress=sys.stderr.isatty(), allow_change=arguments.allow_change)
    text = report.as_json() if arguments.json else "\n".join(map(plain, report.as_text().split("\n")))
    print(text, flush=True)
    if report.would_fail:
        raise InputError(report.would_fail)


def _export(arguments: argparse.Namespace) -> None:
    from diffusion_unet.model_index import draws_from_prompts

    names = ("ema", "dtype", "variant", "layout")
    out = _export_run(Path(arguments.source), Path(arguments.out), **{name: getattr(arguments, name) for name in names})
    if draws_from_prompts(out):
        print(f'Model: {out}. Next: {command()} sample {quote(out)} "a prompt" --seeds 0-7 --out out')
    else:
        print(f"Written: {out}")


def _plot(arguments: argparse.Namespace) -> None:
    sibling("training")
    from training.plotting import plot

    print(f"Plot: {plot(Path(arguments.run_folder), arguments.out and Path(arguments.out))}")


def _evaluate(arguments: argparse.Namespace) -> None:
    settings = settings_of(arguments)
    if arguments.prompts is None:
        for name in ("references", "features", "clip", "classifier"):
            if getattr(arguments, name) is not None:
                raise InputError(f"--{name}: needs --prompts, a file with what is to be drawn")
        model = load(arguments.model, arguments.device)
        scores = _score(model, arguments.images_per_class, **settings)
    else:
        scores = _score_prompts(arguments, **settings)
    if arguments.card:
        from training.card import write_scores

        write_scores(Path(arguments.model) / "README.md", scores)
    print(json.dumps(scores, indent=2))


def _info(arguments: argparse.Namespace) -> None:
    from diffusion_unet.info import describe

    for key, value in describe(Path(arguments.path)).items():
        print(plain(f"{key}: {value}"))


# --- what the verbs take from both siblings


def _train_with_previews(config: "Config", allow_change: Sequence[str] = ()) -> Path:
    sibling("training")
    from training import train
    from training.checks import images_at_once

    settings = {
        "steps": config.validation.num_inference_steps,
        "guidance_scale": config.validation.guidance_scale,
        # No more pictures at once than are trained on at once, which is what there is memory for.
        "batch_size": min(16, images_at_once(config, int(os.environ.get("WORLD_SIZE", "1")))),
    }
    return train(
        config,
        preview=lambda model, prompts, seeds: draw(model, prompts, seeds, **settings),
        allow_change=allow_change,
    )


def _export_run(run: Path, out: Path, **settings: Any) -> Path:
    sibling("training")
    from training import export

    return export(run, out, **settings)


def _settings() -> str:
    """All settings of a training run, explained."""
    sibling("training")
    from training.config import help_text

    return help_text()


def _score(model: "DiffusionModel", images_per_class: int, **settings: Any) -> dict[str, Any]:
    sibling("training")
    from training.evaluate import score_fashion

    scores = score_fashion(partial(draw, model, paired=True, **settings), images_per_class)
    return {**scores, **{name: value for name, value in settings.items() if name != "batch_size"}}


def _score_prompts(arguments: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    sibling("training")
    from training.features import Clip, classifier_network, feature_network
    from training.scores import read_prompts, reference_images, score

    prompts, labels = read_prompts(Path(arguments.prompts))
    features = arguments.features and feature_network(arguments.features)
    clip = arguments.clip and Clip.load(arguments.clip)
    classifier = arguments.classifier and classifier_network(arguments.classifier)
    if features is not None and arguments.references is None:
        raise InputError("--features: needs --references, a folder of pictures to compare with")
    if not (features or clip or classifier):
        raise InputError("--prompts: needs a score: give --features and --references, --clip or --classifier")
    model = load(arguments.model, arguments.device)
    references = reference_images(arguments.references, model) if arguments.references else ()
    count = arguments.images or len(prompts)
    rows = [row % len(prompts) for row in range(count)]
    scores = score(
        partial(draw, model, paired=True, **settings),
        [prompts[row] for row in rows],
        list(range(count)),
        references,
        features=features,
        clip=clip,
        classifier=classifier,
        labels=labels and [labels[row] for row in rows] if classifier else None,
    )
    named = {name: getattr(arguments, name) for name in ("features", "clip", "classifier") if getattr(arguments, name)}
    return {**scores, **named, **{name: value for name, value in settings.items() if name != "batch_size"}}


# --- parser


class _Verb(NamedTuple):
    summary: str
    run: Callable[[argparse.Namespace], None]
    define: Callable[[Parser], None]  # adds the arguments
    examples: str
    overrides: bool = False  # takes --section.key=value


def _parse(argv: list[str]) -> argparse.Namespace:
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h"):
        print("usage: diffusion-unet VERB ...\n\n" + "\n".join(f"  {verb:12}{VERBS[verb].summary}" for verb in VERBS))
        print("\n`diffusion-unet VERB --help` shows what a verb takes, and commands that run.")
        raise SystemExit(0)
    if name == "--version":
        print(f"diffusion-unet {__version__}")
        raise SystemExit(0)
    if name not in VERBS:
        raise InputError(f"unknown verb {name}{suggest(name, VERBS)}; the verbs are {', '.join(VERBS)}")
    verb = VERBS[name]
    parser = Parser(f"diffusion-unet {name}", verb.summary, verb.examples)
    verb.define(parser)
    rest, overrides = split_overrides(argv[1:]) if verb.overrides else (argv[1:], [])
    arguments, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        known = [*parser.known, *(re.findall(r"--[a-z0-9_.]+(?==)", _settings()) if verb.overrides else [])]
        parser.error(f"unknown argument {unknown[0]}{suggest(unknown[0].partition('=')[0], known)}")
    arguments.run, arguments.overrides = verb.run, overrides
    return arguments


VERBS = {
    "quickstart": _Verb(
        "train, export and draw with the embedded photographs of clothing (5 minutes on two CPU cores)",
        _quickstart,
        options.quickstart,
        """examples:
  diffusion-unet quickstart
  diffusion-unet quickstart --train.max_train_steps=50 --output-dir runs/short

--section.key=value changes a setting of configs/quickstart.yaml; `diffusion-unet train --help` lists them.""",
        overrides=True,
    ),
    "check": _Verb(
        "look at data, model and settings of a run before it begins: all faults at once, and what it will take",
        _check,
        options.check,
        """examples:
  diffusion-unet check configs/quickstart.yaml
  diffusion-unet check configs/quickstart.yaml --data.train_data_dir=my/images --json""",
        overrides=True,
    ),
    "train": _Verb(
        "train a model on captioned images; a run that was stopped goes on where it was",
        _train,
        lambda parser: options.train(parser, _settings()),
        """examples:
  diffusion-unet train configs/quickstart.yaml --train.output_dir=runs/mine --train.max_train_steps=200
  diffusion-unet train configs/emoji-32.yaml --optimizer.learning_rate=5e-4
  accelerate launch -m diffusion_unet train configs/quickstart.yaml""",
        overrides=True,
    ),
    "export": _Verb(
        "write a run's model as a diffusers folder",
        _export,
        options.export,
        """examples:
  diffusion-unet export runs/quickstart model
  diffusion-unet export runs/quickstart model --dtype fp16 --variant fp16
  diffusion-unet export runs/lora my-lora --layout kohya""",
    ),
    "plot": _Verb(
        "draw the losses, rate and speed of a run as a PNG",
        _plot,
        options.plot,
        """examples:
  diffusion-unet plot runs/quickstart""",
    ),
    "sample": _Verb(
        "draw pictures from prompts, and from pictures",
        drawing.sample,
        options.sample,
        """examples:
  diffusion-unet sample runs/quickstart/model "a photo of a sneaker" --seeds 0-7 --out out
  diffusion-unet sample runs/quickstart/model "a bag" "a coat" --steps 40 --guidance-scale 2 --solver ddim
  diffusion-unet sample runs/quickstart/model "a coat" --image out/00000-0.png --strength 0.6""",
    ),
    "replay": _Verb(
        "draw a picture again from the record in its file, and say how far off it is",
        drawing.replay,
        options.replay,
        """examples:
  diffusion-unet replay out/00000-0.png
  diffusion-unet replay 00000-0.png --model models/mine --out again.png""",
    ),
    "evaluate": _Verb(
        "scores of a model's pictures as JSON: prompt accuracy, KID, FID, CLIP score",
        _evaluate,
        options.evaluate,
        """examples:
  diffusion-unet evaluate runs/quickstart/model
  diffusion-unet evaluate runs/quickstart/model --guidance-scale 2 --images-per-class 24
  diffusion-unet evaluate model --prompts prompts.txt --references photos --features clip-vit-b-32 --card""",
    ),
    "info": _Verb(
        "say what a file or folder is; nothing in it is run or unpickled",
        _info,
        options.info,
        """examples:
  diffusion-unet info runs/quickstart/model
  diffusion-unet info out/00000-0.png
  diffusion-unet info configs/sdxl.json""",
    ),
}
