"""Text to pictures: everything is planned and checked first, then one loop draws, batch by batch.

Every number in a picture depends on the model, the request and the picture's own seed, never on what else is drawn.
Shapes: B pictures of a batch, C H W in the network's space.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_unet.conditioning import size_ids
from diffusion_unet.errors import InputError
from diffusion_unet.images import to_image
from diffusion_unet.model_index import task_of
from diffusion_unet.random import Purpose, normal

from .guidance import Guidance, GuidedDenoiser
from .solvers import SOLVERS, Table, run, sigmas

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffusion_unet.conditioning import Conditioning
    from diffusion_unet.model import DiffusionModel

MAX_SIDE = 16_384  # pixels

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that `draw` needs besides the model, checked against it."""

    jobs: tuple[tuple[str | None, int], ...]  # prompt (None without text) and seed of each picture
    negative_prompt: str
    guidance: Guidance
    table: Table
    start: float  # what N(0, 1) noise is multiplied by for the first x
    shape: tuple[int, int, int]  # C H W in the network's space
    batch_size: int


def sample(
    model: "DiffusionModel",
    prompts: str | Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    guidance_scale: float = 4.0,
    negative_prompt: str = "",
    solver: str = "dpm++2m",
    spacing: str | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    paired: bool = False,
    progress: Progress | None = None,
    finished: "Callable[[Image], None] | None" = None,
) -> "list[Image]":
    """Draw every prompt with every seed: PIL images, all of the first prompt first.

    Args:
        model: on any device; its weights may be float32, bfloat16 or float16.
        prompts: names of classes for a network that has these. None for a network without either, which then draws
            one picture a seed, and for which guidance, having no second half, changes nothing.
        seeds: whole numbers from 0 to 2**64 - 1. A seed gives the same picture (to 1/255) in every batch.
        steps: network evaluations a picture, twice as many passes where guided.
        guidance_scale: classifier-free guidance; 1 is none, and costs half.
        negative_prompt: what guidance leads away from.
        solver: a name in `solvers.SOLVERS`.
        spacing: where the steps lie, see `solvers.sigmas`; None is the model's own.
        size: (height, width) in pixels; None is the size that the model was trained for.
        batch_size: pictures that go through the network at once.
        paired: draw prompt i with seed i alone; there are as many of both.
        progress: called as progress(step, total) after every step of every batch.
        finished: called with each picture, in order, once its batch is drawn.

    Raises InputError, one line, for any value that cannot be, and NonFiniteError for a picture with NaN or infinity.
    """
    plan = make_plan(
        model,
        prompts,
        seeds=seeds,
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        solver=solver,
        spacing=spacing,
        size=size,
        batch_size=batch_size,
        paired=paired,
    )
    images: list[Image] = []
    for pixels in batches(model, plan, progress):
        for picture in pixels:
            images.append(to_image(picture))
            if finished is not None:
                finished(images[-1])
    return images


def make_plan(
    model: "DiffusionModel",
    prompts: str | Sequence[str] | None,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    negative_prompt: str,
    solver: str,
    spacing: str | None,
    size: tuple[int, int] | None,
    batch_size: int,
    paired: bool = False,
) -> Plan:
    """Arguments and errors as `sample`; nothing is drawn and the network is not run."""
    schedule = model.schedule
    if solver not in SOLVERS:
        raise InputError(f"solver {solver!r} is not known: {', '.join(SOLVERS)}")
    if schedule.zero_snr and schedule.prediction_type == "epsilon":
        raise InputError(
            "a network that predicts epsilon cannot draw from a zero-terminal-SNR schedule: set"
            " rescale_betas_zero_snr to false in scheduler_config.json, or train with v_prediction"
        )
    if not _whole(batch_size) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}: a whole number of at least 1 is needed")
    config = model.unet.config
    if config.in_channels != config.out_channels:
        raise InputError(
            f"the network takes {config.in_channels} channels and predicts {config.out_channels}:"
            f" {task_of(config) or 'it'} needs a picture to start from, which is not drawn from a prompt alone"
        )
    levels = sigmas(schedule, steps, spacing)
    return Plan(
        jobs=_jobs(_prompts(model, prompts, negative_prompt), _seeds(seeds), paired),
        negative_prompt=negative_prompt,
        guidance=Guidance(guidance_scale),
        table=SOLVERS[solver](levels),
        # The network is to see noise of unit variance at first, c_in * x = n. For a variance-preserving model that is
        # x = sqrt(1 + sigma^2) n, as in diffusers: at the last timestep a little of the picture's variance is left.
        start=float(1 / schedule.scaling(levels[0]).c_in),
        shape=(config.out_channels, *_latent_size(model, size)),
        batch_size=int(batch_size),
    )


def draw(model: "DiffusionModel", plan: Plan, progress: Progress | None = None) -> np.ndarray:
    """The pictures of a plan, uint8 [len(plan.jobs), height, width, channels]; the model is left as it was."""
    return np.concatenate(list(batches(model, plan, progress)))


def batches(model: "DiffusionModel", plan: Plan, progress: Progress | None = None) -> Iterator[np.ndarray]:
    """As `draw`, each batch as soon as it is drawn."""
    parts = [plan.jobs[i : i + plan.batch_size] for i in range(0, len(plan.jobs), plan.batch_size)]
    rows = len(plan.table.sigma)
    for number, part in enumerate(parts):

        def step(row: int, before: int = number * rows) -> None:
            if progress is not None:
                progress(before + row, len(parts) * rows)

        # Entered anew for each batch: whoever takes the pictures is outside of both.
        with torch.inference_mode(), _evaluating(model.unet, model.text):
            pixels = model.codec.decode(_draw_batch(model, plan, part, step))
        yield pixels.cpu().numpy()


def _draw_batch(
    model: "DiffusionModel", plan: Plan, batch: Sequence[tuple[str | None, int]], step: Callable[[int], None]
) -> Tensor:
    """[B, C, H, W] float32 in the network's space."""
    device = next(model.unet.parameters()).device

    def noise(draw: int) -> Tensor:
        return torch.cat([normal(seed, Purpose.PICTURE, 0, plan.shape, draw) for _, seed in batch]).to(device)

    levels = plan.table.sigma.tolist()
    conditional, unconditional = _conditioning(model, plan, [prompt for prompt, _ in batch if prompt is not None])
    denoise = GuidedDenoiser(model.denoiser(), plan.guidance, levels, conditional, unconditional)
    return run(plan.table, plan.start * noise(0), denoise, noise, step)


def _conditioning(
    model: "DiffusionModel", plan: Plan, prompts: Sequence[str]
) -> "tuple[Conditioning | None, Conditioning | None]":
    """A row for each prompt, and as many of the negative prompt; each text is encoded once."""
    if model.text is None:
        return None, None
    like = next(model.unet.parameters())
    texts = list(dict.fromkeys([*prompts, plan.negative_prompt]))
    encoded = model.text.encode(texts)
    if model.unet.config.addition_embed_type == "text_time":
        height, width = (side * model.codec.scale_factor for side in plan.shape[1:])
        whole = size_ids((height, width), (0, 0), (height, width))
        encoded = replace(encoded, time_ids=whole.expand(len(texts), -1))
    encoded = encoded.to(like.device, like.dtype)
    conditional = encoded[[texts.index(prompt) for prompt in prompts]]
    return conditional, encoded[[texts.index(plan.negative_prompt)] * len(prompts)]


@contextlib.contextmanager
def _evaluating(*parts: nn.Module | None) -> Iterator[None]:
    """Dropout and the like off, and afterwards on again in the very modules where it was on."""
    training = [module for part in parts if part is not None for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _seeds(seeds: Sequence[int]) -> list[int]:
    seeds = list(seeds)
    for seed in seeds:
        if not _whole(seed) or not 0 <= seed < 2**64:
            raise InputError(f"seed {seed!r} cannot be: whole numbers from 0 to 2**64 - 1")
    if not seeds:
        raise InputError("there is no seed: give at least one")
    return [int(seed) for seed in seeds]


def _jobs(
    prompts: Sequence[str] | Sequence[None], seeds: Sequence[int], paired: bool
) -> tuple[tuple[str | None, int], ...]:
    if not paired:
        return tuple((prompt, seed) for prompt in prompts for seed in seeds)
    if len(prompts) != len(seeds):
        raise InputError(f"there are {len(prompts)} prompts and {len(seeds)} seeds: paired needs as many of both")
    return tuple(zip(prompts, seeds, strict=True))


def _prompts(
    model: "DiffusionModel", prompts: str | Sequence[str] | None, negative_prompt: str
) -> Sequence[str] | Sequence[None]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if model.text is None:
        if prompts or negative_prompt:
            raise InputError("this model has no text encoder: leave the prompts out")
        return [None]
    for prompt in [*prompts, negative_prompt]:
        if not isinstance(prompt, str):
            raise InputError(f"prompt {prompt!r} is no text")
    if not prompts:
        raise InputError("there is no prompt: give at least one")
    model.text.tokenize([*prompts, negative_prompt], refuse_long=True)
    return prompts


def _latent_size(model: "DiffusionModel", size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width in the network's space."""
    factor = model.codec.scale_factor
    size = model.image_size if size is None else size
    if len(size) != 2 or not all(_whole(side) for side in size):
        raise InputError(f"size {size!r} cannot be: two whole numbers, height and width in pixels")
    if max(size) > MAX_SIDE:
        raise InputError(f"a side of the size is over {MAX_SIDE} pixels, the most that can be drawn")
    nearest = tuple(max(1, round(side / factor)) * factor for side in size)
    if tuple(size) != nearest:
        raise InputError(
            f"size {size[1]}x{size[0]} cannot be drawn, width and height are multiples of {factor}: the nearest that"
            f" can is {nearest[1]}x{nearest[0]}"
        )
    return nearest[0] // factor, nearest[1] // factor
