"""Texts and pictures to pictures: everything is planned and checked first, then one loop draws, batch by batch.

Every number in a picture depends on the model, the request and the picture's own seed, never on what else is drawn.
Shapes: B pictures of a batch, C H W in the network's space.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_unet.codec import LatentCodec
from diffusion_unet.errors import InputError
from diffusion_unet.images import to_image
from diffusion_unet.solver_names import solver_named

from .adapters import AdaptedModel
from .edit import Encoded, Source, source_of
from .guidance import Guidance, GuidedDenoiser
from .levels import checked_sigmas
from .levels import sigmas as levels_of
from .noise import Noise, noise_of
from .record import attach, file_entry, record_of
from .request import MAX_SIDE, Request, is_whole
from .solvers import Course, run, solver_table
from .texts import Texts, Told
from .wrapped import wrap

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffusion_unet.model import DiffusionModel

Progress = Callable[[int, int], None]
Watch = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Job:
    """One picture. prompt: None without text; chunks: those in which it and its negative prompt are read."""

    prompt: str | None
    negative_prompt: str
    seed: int
    chunks: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All that `batches` needs besides the model, checked against it."""

    jobs: tuple[Job, ...]
    guidance: Guidance
    guided: bool  # at one of the course's noise levels at least
    course: Course
    start: float  # what N(0, 1) noise is multiplied by for the first x
    shape: tuple[int, int, int]  # C H W in the network's space
    size: tuple[int, int]  # (height, width) in pixels
    batch_size: int
    noise: Callable[[int], Noise]  # of a seed
    source: Source | None
    tile: int | None
    record: dict[str, Any]  # what the records of all pictures share


def sample(
    model: "DiffusionModel",
    prompts: str | Sequence[str] | None = None,
    *,
    model_name: str | None = None,
    model_hash: str | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    finished: "Callable[[Image], None] | None" = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> "list[Image]":
    """Draws what the settings of `Request` say: PIL images, each with its record in `info`, which `save_png` writes.

    Args:
        model: on any device; its weights may be float32, bfloat16 or float16. With adapters, see `with_adapters`. Any
            number of threads may draw from it at once.
        model_name: what the record calls the model. model_hash: its `fingerprint`; None has that computed, for which
            every weight is read.
        progress: called as progress(step, total) after every step of every batch.
        watch: called as watch(number, pictures) after every step, with uint8 [B, H, W, C], what the network expects
            the batch to become, and the number of its first picture.
        finished: called with each picture, in order, once its batch is drawn.
        say: called with a line for a person, where the picture given is not drawn at its own size.

    Raises InputError, one line, for any value that cannot be, and NonFiniteError for a picture with NaN or infinity.
    """
    plan = make_plan(model, Request(prompts=prompts, **settings))
    if say is not None and plan.source is not None and plan.source.note:
        say(plan.source.note)
    base = model.base if isinstance(model, AdaptedModel) else model
    shared = plan.record | {"model": model_name}
    images: list[Image] = []
    for jobs, pixels in batches(model, plan, progress, watch):
        model_hash = model_hash or base.fingerprint()
        for job, picture in zip(jobs, pixels, strict=True):
            own = {"prompt": job.prompt, "negative_prompt": job.negative_prompt or None, "seed": job.seed}
            image = to_image(picture)
            attach(image, record_of(model, model_hash, shared | own | {"batch_size": len(jobs)}))
            images.append(image)
            if finished is not None:
                finished(image)
    return images


def make_plan(model: "DiffusionModel", request: Request) -> Plan:
    """Errors as of `sample`; nothing is drawn and the network is not run."""
    schedule = model.schedule
    if schedule.zero_snr and schedule.prediction_type == "epsilon":
        raise InputError(
            "a network that predicts epsilon cannot draw from a zero-terminal-SNR schedule: set"
            " rescale_betas_zero_snr to false in scheduler_config.json, or train with v_prediction"
        )
    size = None if request.size is None else _checked_size(model, request.size)
    source = source_of(model, request.image, request.mask, size=size, strength=request.strength)
    size = _checked_size(model, source.size if source else model.image_size) if size is None else size
    course, first, named = _course(model, request, source)
    factor = model.codec.scale_factor
    shape = (model.unet.config.out_channels, size[0] // factor, size[1] // factor)
    varied: dict[str, Any] = {
        "variation_seed": request.variation_seed,
        "variation_strength": request.variation_strength,
    }

    def noise(seed: int) -> Noise:
        return noise_of(seed, shape, request.rng, **varied)

    noise(request.seeds[0])  # refuses what cannot be
    if request.tile is not None and not isinstance(model.codec, LatentCodec):
        raise InputError("tile: this model works on pixels, and has no autoencoder to be run in parts; take it out")
    guidance = Guidance(request.guidance_scale, request.guidance_rescale, request.interval)
    guided = any(guidance.passes(sigma) > 1 for sigma in course.sigma.tolist())
    record = {name: getattr(request, name) for name in ("guidance_scale", "guidance_rescale", "eta", "tile")}
    record |= {"interval": request.interval, "size": list(size), "exact": request.exact or None, **named, **varied}
    record["rng"] = request.rng
    if source is not None and request.image is not None:
        record |= {"image": file_entry(request.image), "strength": source.strength}
        record |= {} if request.mask is None else {"mask": file_entry(request.mask)}
    if isinstance(model, AdaptedModel):
        record["adapters"] = model.record
    return Plan(
        jobs=_jobs(model, request, guided),
        guidance=guidance,
        guided=guided,
        course=course,
        # The network is to see noise of unit variance at first, c_in * x = n. For a variance-preserving model that is
        # x = sqrt(1 + sigma^2) n, as in diffusers: at the last timestep a little of the picture's variance is left.
        start=float(1 / schedule.scaling(first).c_in),
        shape=shape,
        size=size,
        batch_size=1 if request.exact else int(request.batch_size),
        noise=noise,
        source=source,
        tile=request.tile,
        record=record,
    )


def draw(model: "DiffusionModel", plan: Plan, progress: Progress | None = None) -> np.ndarray:
    """The pictures of a plan, uint8 [len(plan.jobs), height, width, channels]; the model is left as it was."""
    return np.concatenate([pixels for _, pixels in batches(model, plan, progress)])


def batches(
    model: "DiffusionModel", plan: Plan, progress: Progress | None = None, watch: Watch | None = None
) -> Iterator[tuple[Sequence[Job], np.ndarray]]:
    """As `draw`, each batch with its pictures as soon as these are drawn."""
    parts = list(_parts(plan))
    rows = len(plan.course.sigma)
    texts = Texts(model, plan.course.sigma.tolist(), plan.size)
    decode = partial(_decode, model, plan)
    with torch.inference_mode(), _evaluating(model.unet, model.text):
        encoded = None if plan.source is None else plan.source.encode(model, plan.tile)
    for number, (first, jobs) in enumerate(parts):

        def step(row: int, x0: Tensor, before: int = number * rows, first: int = first) -> None:
            if watch is not None:
                watch(first, decode(x0))
            if progress is not None:
                progress(before + row, len(parts) * rows)

        # Entered anew for each batch: whoever takes the pictures is outside of both.
        with torch.inference_mode(), _evaluating(model.unet, model.text):
            pixels = decode(_draw_batch(model, plan, jobs, texts, encoded, step))
        yield jobs, pixels


def _parts(plan: Plan) -> Iterator[tuple[int, Sequence[Job]]]:
    """The batches, each with the number of its first picture: neighbours whose texts are read in as many chunks."""
    first = 0
    for _, group in itertools.groupby(plan.jobs, key=lambda job: job.chunks):
        jobs = list(group)
        for start in range(0, len(jobs), plan.batch_size):
            part = jobs[start : start + plan.batch_size]
            yield first, part
            first += len(part)


def _draw_batch(
    model: "DiffusionModel",
    plan: Plan,
    jobs: Sequence[Job],
    texts: Texts,
    encoded: Encoded | None,
    step: Callable[[int, Tensor], None],
) -> Tensor:
    """[B, C, H, W] float32 in the network's space. step: called with the rows done and the network's last answer."""
    device = next(model.unet.parameters()).device
    sources = [plan.noise(job.seed) for job in jobs]

    def noise(draw: int) -> Tensor:
        return torch.stack([source(draw) for source in sources]).to(device)

    begun = noise(0)
    levels = plan.course.sigma.tolist()
    denoise: Callable[[Tensor, float], Tensor]
    denoise = GuidedDenoiser(model.denoiser(), plan.guidance, levels, *_told(plan, jobs, texts, encoded))
    x = plan.start * begun
    if encoded is not None:
        x = encoded.begin(begun, levels[0], plan.start)
        denoise = encoded.wrap(denoise, begun)
    answers: list[Tensor] = []

    def asked(x: Tensor, sigma: float) -> Tensor:
        answers[:] = [denoise(x, sigma)]
        return answers[0]

    return run(plan.course, x, asked, noise, lambda row: step(row, answers[0]))


def _told(plan: Plan, jobs: Sequence[Job], texts: Texts, encoded: Encoded | None) -> list[Told]:
    """Conditional and unconditional, a row for each picture."""
    halves = [Told.cat(texts.rows([(job.prompt, job.chunks) for job in jobs]))]
    if plan.guided and jobs[0].prompt is not None:
        negative = [(job.negative_prompt, job.chunks) for job in jobs]
        halves.append(Told.cat(texts.rows(negative, guiding=False)))
    if encoded is None:
        return halves
    return [replace(half, conditioning=encoded.condition(half.conditioning, len(jobs))) for half in halves]


def _decode(model: "DiffusionModel", plan: Plan, x0: Tensor) -> np.ndarray:
    """uint8 [B, H, W, C]"""
    codec = model.codec
    decoded = codec.decode(x0, plan.tile) if isinstance(codec, LatentCodec) else codec.decode(x0)
    pixels: np.ndarray = decoded.cpu().numpy()
    return pixels if plan.source is None else plan.source.finish(pixels)


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


def _course(model: "DiffusionModel", request: Request, source: Source | None) -> tuple[Course, float, dict[str, Any]]:
    """The course, the level that it begins at, and what a record says of them."""
    schedule = model.schedule
    if not isinstance(request.solver, str):
        if not (request.sigmas is None and request.spacing is None and request.eta is None and source is None):
            raise InputError("a scheduler sets its own noise levels: leave out sigmas, spacing, eta and image")
        course = wrap(request.solver, request.steps)
        name = type(request.solver).__name__
        return course, float(course.sigma[0]), {"solver": f"{name} of diffusers", "steps": request.steps}
    solver, spacing = solver_named(request.solver)
    if request.spacing is not None:
        spacing = request.spacing
    if request.sigmas is not None:
        if request.spacing is not None:
            raise InputError("sigmas and spacing both say where the steps lie: leave one of them out")
        levels, spacing = checked_sigmas(request.sigmas), None
    elif source is not None:
        levels = source.levels(schedule, request.steps, spacing)
    else:
        levels = levels_of(schedule, request.steps, spacing)
    named = {"solver": solver, "steps": len(levels) - 1, "spacing": spacing, "sigmas": levels.tolist()}
    return solver_table(solver, levels, schedule, request.eta), float(levels[0]), named


def _jobs(model: "DiffusionModel", request: Request, guided: bool) -> tuple[Job, ...]:
    if model.text is None:
        if request.texts or any(request.negatives):
            raise InputError("this model has no text encoder: leave the prompts out")
        return tuple(Job(None, "", seed, 1) for _, _, seed in request.pictures())
    if not request.texts:
        raise InputError("there is no prompt: give at least one")
    # As long as both need; but a negative prompt that no pass reads changes nothing, however long it is.
    pairs = dict.fromkeys(zip(request.texts, request.negatives, strict=True))
    chunks = {pair: model.text.chunks(*(pair if guided else pair[:1])) for pair in pairs}
    jobs = [(str(prompt), negative, seed) for prompt, negative, seed in request.pictures()]
    return tuple(Job(*job, chunks[job[0], job[1]]) for job in jobs)


def _checked_size(model: "DiffusionModel", size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels."""
    factor = model.codec.scale_factor
    if len(size) != 2 or not all(is_whole(side) for side in size):
        raise InputError(f"size {size!r} cannot be: two whole numbers, height and width in pixels")
    if max(size) > MAX_SIDE:
        raise InputError(f"a side of the size is over {MAX_SIDE} pixels, the most that can be drawn")
    nearest = tuple(max(1, round(side / factor)) * factor for side in size)
    if tuple(size) != nearest:
        raise InputError(
            f"size {size[1]}x{size[0]} cannot be drawn, width and height are multiples of {factor}: the nearest that"
            f" can is {nearest[1]}x{nearest[0]}"
        )
    return nearest[0], nearest[1]
