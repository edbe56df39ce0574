"""What each verb of the command line takes: its arguments, their types, defaults and explanations."""

from pathlib import Path

from diffusion_unet.arguments import (
    Parser,
    finite,
    interval,
    numbers,
    one_seed,
    seeds,
    size,
    solver,
    steps,
    suggest,
    whole,
)
from diffusion_unet.errors import InputError
from diffusion_unet.solver_names import NAMES, SPACINGS

RNGS = ("philox", "torch", "nv")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def find_config(name: str) -> Path:
    """The file of this name; where there is none, the config of this name that comes along."""
    shipped = CONFIGS / f"{name}.yaml"
    if not Path(name).suffix and Path(name).name == name and not Path(name).exists() and not shipped.is_file():
        known = [file.stem for file in sorted(CONFIGS.glob("*.yaml"))]
        raise InputError(f"{name}: there is no such config file{suggest(name, known)}")
    return shipped if not Path(name).is_file() and Path(name).name == name and shipped.is_file() else Path(name)


def drawing(parser: Parser) -> None:
    parser.add_argument("--steps", type=steps, default=20, help="sampling steps (%(default)s)")
    parser.add_argument(
        "--guidance-scale", type=finite, default=4.0, help="classifier-free guidance; 1 is none (%(default)s)"
    )
    parser.add_argument("--guidance-rescale", type=finite, default=0.0, help="against too much contrast, 0 to 1 (0)")
    parser.add_argument(
        "--interval",
        type=interval,
        default=(None, None),
        metavar="LOW:HIGH",
        help="guide at noise levels between these only, which saves a pass at the others (all)",
    )
    parser.add_argument(
        "--solver",
        type=solver,
        default=NAMES[0],
        help=f"{', '.join(NAMES)}, or as A1111 and diffusers spell them (%(default)s)",
    )
    parser.add_argument("--eta", type=finite, help="of ddim, euler_a, dpm++2m_sde: noise put in anew, 0 to 1")
    parser.add_argument("--spacing", choices=SPACINGS, help="where the steps lie: %(choices)s (the model's own)")
    parser.add_argument("--negative-prompt", default="", help="what the pictures should not show (nothing)")
    parser.add_argument("--size", type=size, metavar="WxH", help="width and height in pixels (as trained)")
    parser.add_argument("--batch-size", type=whole, default=16, help="pictures drawn at once (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda where there is one, else cpu)")


def quickstart(parser: Parser) -> None:
    parser.add_argument("--output-dir", default="runs/quickstart", help="folder for all that it makes (%(default)s)")


def check(parser: Parser) -> None:
    parser.usage = "diffusion-unet check CONFIG [--json] [--allow-change SETTING ...] [--section.key=value ...]"
    parser.add_argument("config", metavar="CONFIG", help="as for `train`, whose settings it takes")
    parser.add_argument("--json", action="store_true", help="for programs")
    _resuming(parser)


def _resuming(parser: Parser) -> None:
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="SETTING",
        help="a setting, such as optimizer.learning_rate, that may differ from the checkpoint's; again for each more",
    )


def train(parser: Parser, settings: str) -> None:
    parser.usage = "diffusion-unet train CONFIG [--allow-change SETTING ...] [--section.key=value ...]"
    shipped = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    parser.add_argument(
        "config", metavar="CONFIG", help=f"YAML file with the sections below, or the name of one here: {shipped}"
    )
    _resuming(parser)
    parser.epilog = f"{parser.epilog}\n\nsettings, their defaults, and what they mean:\n\n{settings}"


def export(parser: Parser) -> None:
    parser.add_argument("source", metavar="RUN", help="folder of a training run")
    parser.add_argument("out", metavar="OUT", help="folder to write to; with single-file a name.safetensors")
    parser.add_argument("--ema", metavar="NAME", help="which averaged weights (the run's own); none: the last weights")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="number format of the weights (fp32)")
    parser.add_argument("--variant", help="word in the names of the weight files, such as fp16 (none)")
    parser.add_argument(
        "--layout",
        choices=("diffusers", "kohya", "single-file"),
        default="diffusers",
        help="diffusers; kohya, for a LoRA; single-file, one .safetensors file of original keys (%(default)s)",
    )


def plot(parser: Parser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of a training run")
    parser.add_argument("--out", metavar="FILE", help="the PNG to write (RUN/plot.png)")


def sample(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, as `export` writes it")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to draw")
    parser.add_argument(
        "--prompts",
        dest="prompts_file",
        metavar="FILE",
        help='.txt, one a line, or .jsonl of {"prompt": ..., "negative_prompt": ..., "seed": 4}',
    )
    parser.add_argument("--seeds", type=seeds, default=[0], help="0-7 or 0,3: one picture of each prompt for each (0)")
    drawing(parser)
    parser.add_argument("--sigmas", type=numbers, metavar="S,S,...", help="the noise levels themselves, falling")
    parser.add_argument("--image", metavar="FILE", help="a picture to draw from (img2img)")
    parser.add_argument("--mask", metavar="FILE", help="white where that picture is to be drawn anew (inpainting)")
    parser.add_argument("--strength", type=finite, help="how much of the picture is drawn anew, above 0 to 1 (0.8)")
    parser.add_argument(
        "--rng", choices=RNGS, default=RNGS[0], help="whose noise a seed gives: %(choices)s (%(default)s)"
    )
    parser.add_argument("--variation-seed", type=one_seed, metavar="SEED", help="a seed to go towards")
    parser.add_argument("--variation-strength", type=finite, default=0.0, help="how far, 0 to 1 (0)")
    parser.add_argument("--exact", action="store_true", help="one picture a pass: bit for bit as its seed gives alone")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="again for each more")
    parser.add_argument("--controlnet", action="append", default=[], metavar="DIR[:SCALE]", help="again for each more")
    parser.add_argument("--control-image", action="append", default=[], metavar="FILE", help="one for each ControlNet")
    parser.add_argument("--ip-adapter", metavar="FILE[:SCALE]", help="a picture as a prompt, with the next two")
    parser.add_argument("--ip-adapter-encoder", metavar="DIR", help="its CLIP image encoder")
    parser.add_argument("--ip-adapter-image", metavar="FILE", help="its picture")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="numbers to compute in (those of the files)")
    parser.add_argument("--tile", type=whole, metavar="PIXELS", help="autoencoder in squares of this side: less memory")
    parser.add_argument("--compile", action="store_true", help="compile the network at its first step")
    parser.add_argument("--preview", metavar="DIR", help="folder for what the pictures look like, step by step")
    parser.add_argument("--out", default="out", help="folder for the pictures (%(default)s)")


def replay(parser: Parser) -> None:
    parser.add_argument("picture", metavar="PICTURE", help="a PNG that `sample` wrote")
    parser.add_argument("--model", metavar="DIR", help="its model (looked for by its hash)")
    parser.add_argument(
        "--file", action="append", default=[], help="a picture or adapter that it was drawn with; again for each more"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (the record's)")
    parser.add_argument("--out", metavar="FILE", help="write the picture drawn again there")


def evaluate(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model folder; without --prompts one of the embedded photographs"
    )
    parser.add_argument(
        "--images-per-class", type=whole, default=12, help="without --prompts: pictures of each noun (%(default)s)"
    )
    parser.add_argument("--prompts", metavar="FILE", help='.txt, one a line, or .jsonl of {"prompt": ..., "label": 4}')
    parser.add_argument("--images", type=whole, metavar="N", help="pictures to draw, around the prompts (one of each)")
    parser.add_argument("--references", metavar="FOLDER", help="real pictures, for FID and KID")
    parser.add_argument(
        "--features",
        metavar="NET",
        help="for FID and KID: fashion, folder of a CLIP model, or package.module:name, which is called with a list of"
        " PIL pictures and gives a tensor [N, D]",
    )
    parser.add_argument("--clip", metavar="FOLDER", help="folder of a CLIP model, for the CLIP score")
    parser.add_argument(
        "--classifier",
        metavar="NET",
        help="for prompt accuracy: fashion, or package.module:name as above, giving logits",
    )
    parser.add_argument("--card", action="store_true", help="write the scores into the model's README.md, too")
    drawing(parser)
    parser.set_defaults(batch_size=60)  # small pictures


def info(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", help="model folder, run, checkpoint, weights, config or picture")
