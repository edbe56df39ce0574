"""A guided trajectory beside diffusers' pipeline: same weights, solver, noise levels and first noise, fp32 on the CPU.

    python benchmarks/trajectory.py --json benchmarks/results/trajectory.json
    python benchmarks/trajectory.py --case sd15-64 --steps 20 --rounds 1

Timed on both sides is what turns noise and encoded prompts into finished latents: theirs is the call of the pipeline
with `prompt_embeds`, `latents` and output_type="latent", ours all that `sampling` does between the encoded prompts and
the codec (the solver's table, the plan of the passes, what is precomputed, the loop). Text encoder and autoencoder are
outside of both, and are not made. One picture, guidance 7.5, DPM-Solver++ 2M at the whole timesteps of diffusers'
scheduler, as many threads as torch takes. The networks share one set of random weights and take turns, round by round.

Every row but the interval's must end at diffusers' latents, and the interval's, which diffusers has not, at those of
both halves run in every step without a cache, with a scale of 1 outside of the interval: the largest difference is at
most 1e-3 of the latents' standard deviation, for every run that is timed, or there is no report. Rows that leave out
one thing tell its share; without what is precomputed there is no shared beginning of the two halves either.

The pixel model is that of configs/emoji-32.yaml, SDXL's network has its full width and two transformer blocks, for ten,
at its lowest resolution. At 64x64 latents SD 1.5 takes 8 steps unless told otherwise.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from torch import Tensor, nn

sys.path.extend(str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests", "benchmarks/reliability"))

from common import machine
from families import SD15, SDXL

from diffusion_unet.attention import repeated
from diffusion_unet.conditioning import Conditioning, size_ids
from diffusion_unet.config import UNetConfig
from diffusion_unet.denoiser import Denoiser
from diffusion_unet.schedule import NoiseSchedule
from diffusion_unet.unet import Cache, UNet
from sampling.guidance import Guidance, GuidedDenoiser
from sampling.solvers import dpmpp_2m, run
from sampling.texts import Told

ROOT = Path(__file__).resolve().parents[1]
SCALE = 7.5
LOW, HIGH = 0.28, 5.42  # of the interval
TOLERANCE = 1e-3  # largest difference of latents, of their standard deviation
THEIRS, OURS = "diffusers' pipeline", "sampling"
NO_PREFIX, NO_CACHE = "sampling, both halves whole", "sampling, nothing precomputed"
INTERVAL = f"sampling, interval {LOW}:{HIGH}"

PIXELS: dict[str, Any] = yaml.safe_load((ROOT / "configs/emoji-32.yaml").read_text())["model"]["unet"]
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012, "prediction_type": "epsilon"}

Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network by its config.json, whose sample_size is the latents', and how it is asked."""

    unet: dict[str, Any]
    noise: dict[str, Any]  # of the scheduler's config
    tokens: int
    steps: int
    rounds: int
    aim: float  # times as fast as diffusers


CASES = {
    "pixel32": Case({**PIXELS, "sample_size": 32}, LINEAR, 24, 20, 15, 1.5),
    "sd15-32": Case({**SD15, "sample_size": 32}, SCALED, 77, 20, 3, 1.15),
    "sd15-64": Case({**SD15, "sample_size": 64}, SCALED, 77, 8, 3, 1.15),
    "sdxl-32": Case({**SDXL, "sample_size": 32, "transformer_layers_per_block": [1, 2, 2]}, SCALED, 77, 20, 3, 1.15),
}
INTERVAL_AIM = 1.35


class Plain(nn.Module):
    """A network that offers no `precompute`, and is shown each image once for each text."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: float | Tensor, context: Tensor, **inputs: Any) -> Tensor:
        return self.unet(repeated(x, context), timestep, context, **inputs)


class Whole(Plain):
    """The same with `precompute`: all that is missing is the shared beginning of the two halves."""

    def precompute(self, context: Tensor | None, timesteps: Sequence[float], **conditions: Tensor | None) -> Cache:
        return self.unet.precompute(context, timesteps, **conditions)


@dataclass(frozen=True)
class Bench:
    """Two networks around the same weights, and what they are asked."""

    unet: UNet
    pipe: Any
    schedule: NoiseSchedule
    conditional: Conditioning
    unconditional: Conditioning
    noise: Tensor  # [1, C, h, w]

    def levels(self, steps: int) -> Tensor:
        """float64 [steps + 1]: the noise levels of diffusers' timesteps, and 0."""
        self.pipe.scheduler.set_timesteps(steps)
        return torch.cat([self.schedule.sigma(self.pipe.scheduler.timesteps), torch.zeros(1, dtype=torch.float64)])

    def theirs(self, steps: int) -> Tensor:
        given = {"prompt_embeds": self.conditional.context, "negative_prompt_embeds": self.unconditional.context}
        if self.conditional.pooled is not None:
            given["pooled_prompt_embeds"] = self.conditional.pooled
            given["negative_pooled_prompt_embeds"] = self.unconditional.pooled
        asked = {"num_inference_steps": steps, "guidance_scale": SCALE, "latents": self.noise, "output_type": "latent"}
        latents: Tensor = self.pipe(**given, **asked, return_dict=False)[0]
        return latents

    @torch.inference_mode()
    def ours(self, levels: Tensor, network: nn.Module, guidance: Guidance) -> Tensor:
        course, denoiser = dpmpp_2m(levels), Denoiser(network, self.schedule)
        sigmas, halves = course.sigma.tolist(), (self.conditional, self.unconditional)
        told = [Told(half, denoiser.precompute(sigmas, half)) for half in halves]
        return run(course, self._first(levels), GuidedDenoiser(denoiser, guidance, sigmas, *told), _never)

    @torch.inference_mode()
    def reference(self, levels: Tensor) -> Tensor:
        """What the interval has to come to: no step is spared, and no half."""
        denoiser = Denoiser(self.unet, self.schedule)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            conditional, unconditional = (denoiser(x, sigma, half) for half in (self.conditional, self.unconditional))
            scale = SCALE if LOW < sigma <= HIGH else 1.0
            return unconditional + scale * (conditional - unconditional)

        return run(dpmpp_2m(levels), self._first(levels), denoise, _never)

    def _first(self, levels: Tensor) -> Tensor:
        return self.noise / float(self.schedule.scaling(levels[0]).c_in)


def _never(draw: int) -> Tensor:
    raise AssertionError("DPM-Solver++ 2M draws no noise after the first")


def make_bench(case: Case) -> Bench:
    """Weights are drawn as torch's layers draw them, and shared: SDXL's take 3.6 GB."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_diffusers(case.unet)).requires_grad_(False).eval()
    with torch.device("meta"):
        stock = diffusers.UNet2DConditionModel(**{k: v for k, v in case.unet.items() if not k.startswith("_")})
    stock.load_state_dict(unet.state_dict(), assign=True)
    settings = {**case.noise, "timestep_spacing": "trailing", "steps_offset": 1}
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    parts = {**absent, "unet": stock.eval(), "scheduler": diffusers.DPMSolverMultistepScheduler(**settings)}
    side, width, config = case.unet["sample_size"], unet.context_width, unet.config
    halves = [Conditioning(context=torch.randn(1, case.tokens, width or 0)) for _ in range(2)]
    if config.addition_embed_type is None:
        checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, **checker)
    else:
        second = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        pipe = diffusers.StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
        pixels = (8 * side, 8 * side)
        ids = size_ids(pixels, (0, 0), pixels)[None]
        pooled = (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)
        halves = [Conditioning(half.context, pooled=torch.randn(1, pooled), time_ids=ids) for half in halves]
    pipe.set_progress_bar_config(disable=True)
    schedule = NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler", **settings})
    noise = torch.randn(1, config.in_channels, side, side)
    return Bench(unet, pipe, schedule, halves[0], halves[1], noise)


def contestants(bench: Bench, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Each row's trajectory, diffusers' first."""
    levels, full, within = bench.levels(steps), Guidance(SCALE), Guidance(SCALE, interval=(LOW, HIGH))
    rows = {
        THEIRS: partial(bench.theirs, steps),
        OURS: partial(bench.ours, levels, bench.unet, full),
        NO_PREFIX: partial(bench.ours, levels, Whole(bench.unet), full),
        NO_CACHE: partial(bench.ours, levels, Plain(bench.unet), full),
        INTERVAL: partial(bench.ours, levels, bench.unet, within),
    }
    if bench.conditional.pooled is not None:
        del rows[NO_PREFIX]  # each half has an embedding of its own from the first block on: nothing is shared
    return rows


def distance(latents: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations."""
    return float((latents - expected).abs().max() / expected.std())


def measure(name: str, steps: int, rounds: int) -> Result:
    """All rows of a case, in turn. Ends the program where one of them comes to other latents."""
    bench = make_bench(CASES[name])
    for trajectory in contestants(bench, 2).values():
        trajectory()
    rows, levels = contestants(bench, steps), bench.levels(steps)
    reference = bench.reference(levels)
    runs: dict[str, list[Result]] = {row: [] for row in rows}
    expected = reference
    for number in range(rounds):
        for row, trajectory in rows.items():
            clock, processor = time.perf_counter(), time.process_time()
            latents = trajectory()
            took = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
            if row == THEIRS:
                expected = latents
            apart = distance(latents, reference if row == INTERVAL else expected)
            if not apart <= TOLERANCE:
                raise SystemExit(f"{name}: {row} ends {apart:.1e} standard deviations away: no time counts")
            runs[row].append({**took, "difference": apart})
            print(f"{name}  round {number + 1}  {row:32} {took['seconds']:8.2f} s", file=sys.stderr, flush=True)
    if not distance(reference, expected) > 10 * TOLERANCE:
        raise SystemExit(f"{name}: guidance hardly changes the latents, so that no difference would be seen")
    return {
        "weights": sum(parameter.numel() for parameter in bench.unet.parameters()),
        "steps": steps,
        "rounds": rounds,
        "passes": {"full": 2 * steps, "interval": _passes(levels)},
        "difference_of_interval": distance(reference, expected),
        "runs": runs,
    }


def _passes(levels: Tensor) -> int:
    """Halves that the network runs with the interval."""
    guidance = Guidance(SCALE, interval=(LOW, HIGH))
    return sum(guidance.passes(sigma) for sigma in levels[:-1].tolist())


def ratios(runs: dict[str, list[Result]], row: str, key: str) -> list[float]:
    """Theirs to ours, round by round."""
    return [theirs[key] / ours[key] for theirs, ours in zip(runs[THEIRS], runs[row], strict=True)]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(cases: dict[str, Result]) -> str:
    """Markdown: medians over the rounds, and the least and most."""
    lines = [
        "| | | seconds | times as fast, by the clock | by processor time | aim | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        for row, found in case["runs"].items():
            aim = {OURS: CASES[name].aim, INTERVAL: INTERVAL_AIM}.get(row)
            cells = [f"{name}, {case['steps']} steps" if row == THEIRS else "", row]
            cells.append(spread([one["seconds"] for one in found]))
            cells += [spread(ratios(case["runs"], row, key)) for key in ("seconds", "processor_seconds")]
            cells += ["" if aim is None else f"{aim}", f"{max(one['difference'] for one in found):.1e}"]
            lines.append(f"| {' | '.join(cells)} |")
    notes = [
        f"{name}: {case['weights'] / 1e6:.0f} million weights; medians (least to most) of {case['rounds']} rounds; with"
        f" the interval {case['passes']['interval']} passes for {case['passes']['full']}."
        for name, case in cases.items()
    ]
    return "\n".join([*lines, "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, help="of every case (20; of sd15-64 8)")
    parser.add_argument("--rounds", type=int, help="of every case (3; of pixel32 15)")
    parser.add_argument("--json", type=Path, help="file for every measurement, written after each case")
    options = parser.parse_args()
    cases: dict[str, Result] = {}
    for name in options.case:
        case = CASES[name]
        cases[name] = measure(name, options.steps or case.steps, options.rounds or case.rounds)
        if options.json:
            report = {"machine": {**machine(), "threads": torch.get_num_threads()}, "cases": cases}
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(cases))


if __name__ == "__main__":
    main()
