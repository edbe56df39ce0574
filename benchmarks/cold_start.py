"""The first denoising step of SD 1.5 from a cold start, beside diffusers: processes that begin with nothing imported.

    python benchmarks/cold_start.py FOLDER --json benchmarks/results/cold_start.json

FOLDER gets a Stable Diffusion 1.5 model of full size with random weights in float32, 4.3 GB, unless one is there: its
U-Net, text encoder, autoencoder and a tokenizer of 49,408 tokens, and no safety checker, which spares diffusers one.

Each start is a process of its own, `python -c`, the two kinds in turn after one of each that does not count, so that
libraries and weights are in the page cache. --evict puts the weights out of it before each start, and leaves the
libraries in. Ours is `DiffusionModel.load`, the prompt encoded, and the first of 20 steps; theirs
`StableDiffusionPipeline.from_pretrained` with nothing but the folder, `encode_prompt`, and the call of the pipeline,
stopped by its callback after the first of 20 steps. One picture, guidance 7.5, DDIM, the same noise; after the step the
latents must be the same to 1e-4 of their standard deviation.

The clock runs from before the process is started to the end of the step. Its parts: imports is what is imported at
first; what each side imports only when it reads a model (ours: transformers and diffusers) is part of load; text has
our keys and values for all steps, which diffusers computes in each. The weights' hash, which `sample` writes into the
records of pictures, is not part of it. Memory is the most that was resident, pages of the mapped files included. Linux
alone: its processes share one monotonic clock.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT, SCALE, STEPS = "a photograph of a red boot on a wooden table", 7.5, 20
TOKENS = 49_408  # of CLIP's vocabulary
TOLERANCE = 1e-4  # largest difference of latents, of their standard deviation
AIM = 0.5  # of diffusers' time
SIDES = {"theirs": "diffusers", "ours": "diffusion-unet"}

Result = dict[str, Any]


# ---- what the processes run; nothing is imported before the clock runs but the standard library


def ours(folder: str, side: int) -> None:
    """The first step by this project."""
    import torch

    from diffusion_unet.model import DiffusionModel
    from sampling.guidance import Guidance, GuidedDenoiser
    from sampling.levels import sigmas
    from sampling.solvers import ddim, run
    from sampling.texts import Texts

    marks = {"imports": time.perf_counter()}
    model = DiffusionModel.load(folder)
    marks["load"] = time.perf_counter()
    levels = sigmas(model.schedule, STEPS)
    with torch.inference_mode():
        asked = levels[:-1].tolist()
        told = Texts(model, asked, (8 * side, 8 * side)).rows([(PROMPT, 1), ("", 1)])
        marks["text"] = time.perf_counter()
        denoise = GuidedDenoiser(model.denoiser(), Guidance(SCALE), asked, *told)
        c_in = model.schedule.scaling(levels[:2]).c_in.tolist()
        noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
        # DDIM looks at no other level than the two of a step.
        x = run(ddim(levels[:2]), noise / c_in[0], denoise, lambda draw: torch.zeros_like(noise))
        marks["first step"] = time.perf_counter()
    _tell(marks, (c_in[1] * x).flatten().tolist())


def theirs(folder: str, side: int) -> None:
    """The first step by diffusers."""
    import torch
    from diffusers import StableDiffusionPipeline

    marks = {"imports": time.perf_counter()}
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    marks["load"] = time.perf_counter()
    with torch.no_grad():
        conditional, unconditional = pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, True, "")
    marks["text"] = time.perf_counter()
    found: list[float] = []

    def stop(pipe: Any, step: int, timestep: int, given: Result) -> Result:
        marks["first step"] = time.perf_counter()
        found.extend(given["latents"].flatten().tolist())
        pipe._interrupt = True  # as diffusers' pages have it: the other steps are passed over
        return given

    pipe(
        prompt_embeds=conditional,
        negative_prompt_embeds=unconditional,
        latents=torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="latent",
        callback_on_step_end=stop,
    )
    _tell(marks, found)


def _tell(marks: dict[str, float], latents: list[float]) -> None:
    status = Path("/proc/self/status").read_text()
    memory = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"marks": marks, "memory": memory, "latents": latents}))


def make_model(folder: str) -> None:
    """The model, its weights as torch's layers draw them, its tokenizer's words made up."""
    sys.path.append(str(ROOT / "tests"))
    import torch
    from diffusers import AutoencoderKL
    from families import SD15

    from diffusion_unet.codec import LatentCodec
    from diffusion_unet.conditioning import new_text_encoder, train_tokenizer
    from diffusion_unet.config import UNetConfig
    from diffusion_unet.model import DiffusionModel
    from diffusion_unet.schedule import NoiseSchedule
    from diffusion_unet.unet import UNet

    torch.manual_seed(0)
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [PROMPT, *("".join(chance.choices(letters, k=chance.randint(4, 10))) for _ in range(60_000))]
    tokenizer = train_tokenizer(words, TOKENS, 77)
    assert len(tokenizer) == TOKENS
    text = new_text_encoder(tokenizer, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        sample_size=512,
    )
    unet = UNet(UNetConfig.from_diffusers(SD15))
    DiffusionModel(unet, NoiseSchedule.scaled_linear(), text, LatentCodec(vae)).save(folder)


# ---- what starts them


def start(call: str) -> str:
    """What a new process prints that makes this call of this module."""
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", f"import cold_start; cold_start.{call}"]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{call} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def take(name: str, folder: Path, side: int) -> Result:
    """One start: the seconds of its parts, in order, and of all; its memory, and the latents."""
    began = time.perf_counter()
    found: Result = json.loads(start(f"{name}({str(folder)!r}, {side})").splitlines()[-1])
    times = [began, *found["marks"].values()]
    parts = {part: after - before for part, before, after in zip(found["marks"], times, times[1:], strict=False)}
    whole = {"before the step": times[-2] - began, "whole": times[-1] - began}
    return {"seconds": parts | whole, "memory": found["memory"], "latents": found["latents"]}


def evict(folder: Path) -> None:
    """The files' pages out of the page cache; nobody else has them open, and all that was written is on disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def distance(latents: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference, in standard deviations."""
    largest = max(abs(one - other) for one, other in zip(latents, expected, strict=True))
    return largest / statistics.pstdev(expected)


def measure(folder: Path, side: int, rounds: int, cold: bool) -> dict[str, list[Result]]:
    """All starts, in turn. Ends the program where the two come to other latents."""
    results: dict[str, list[Result]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name in SIDES:
            if cold:
                evict(folder)
            result = take(name, folder, side)
            if number:
                results[name].append(result)
                print(f"round {number}  {SIDES[name]:16} {result['seconds']['whole']:7.2f} s", file=sys.stderr)
    expected = results["theirs"][0].pop("latents")
    for result in (result for found in results.values() for result in found if "latents" in result):
        result["difference"] = distance(result.pop("latents"), expected)
        if not result["difference"] <= TOLERANCE:
            raise SystemExit(
                f"the first steps are {result['difference']:.1e} standard deviations apart: no time counts"
            )
    return results


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(results: dict[str, list[Result]]) -> str:
    """Markdown: medians over the rounds, and the least and most."""
    lines = [f"| | {' | '.join(SIDES.values())} | ours to theirs |", "|---|---|---|---|"]
    for part in results["ours"][0]["seconds"]:
        seconds = {name: [result["seconds"][part] for result in found] for name, found in results.items()}
        ratio = spread([mine / other for mine, other in zip(seconds["ours"], seconds["theirs"], strict=True)])
        aim = f"; aim {AIM}" if part == "whole" else ""
        lines.append(f"| {part}, s | {' | '.join(spread(seconds[name]) for name in SIDES)} | {ratio}{aim} |")
    memory = {name: [result["memory"] / 1e9 for result in found] for name, found in results.items()}
    ratio = spread([mine / other for mine, other in zip(memory["ours"], memory["theirs"], strict=True)])
    lines.append(f"| peak memory, GB | {' | '.join(spread(memory[name]) for name in SIDES)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the model; made where it is not there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--evict", action="store_true", help="the weights are read from the disk in every start")
    parser.add_argument("--json", type=Path, help="file for every measurement")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if not (folder / "model_index.json").is_file():
        start(f"make_model({str(folder)!r})")
    results = measure(folder, options.side, options.rounds, options.evict)
    if options.json:
        sys.path.append(str(ROOT / "benchmarks" / "reliability"))
        from common import machine

        settings = {"rounds": options.rounds, "side": options.side, "evict": options.evict}
        report = {"machine": machine(), "settings": settings, "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
