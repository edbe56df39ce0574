"""What is looked at on the way of a run: pictures of the validation prompts, and the held-out loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from diffusion_unet.errors import Stopped
from diffusion_unet.images import grid, save_png
from diffusion_unet.model import DiffusionModel

from .checks import images_at_once
from .engine import heeding, resharded, whole
from .evaluate import CHUNK, measure
from .network import Network
from .optimizer import averages_itself, evaluating
from .start import has_preview, untrained

if TYPE_CHECKING:
    from .loop import Trainer

Preview = Callable[[DiffusionModel, list[str], list[int]], list[Image]]

PREVIEWS = "previews"
HELD_OUT_IMAGES = 256  # at most, of a held-out loss
OWN_AVERAGE = "optimizer"  # name of the averages that a schedule-free optimizer keeps itself


def draw_and_measure(trainer: "Trainer", preview: Preview | None) -> None:
    """Pictures by the first average, or where there is none by the weights themselves; losses by all of them.

    Of processes over which the weights are cut, all call this; of others the main one. Raises SaveError, Stopped, and
    whatever `preview` raises."""
    config, model, step = trainer.config, trainer.model, trainer.steps_done
    weights: dict[str, Callable[[], AbstractContextManager[Any]]] = {"raw": nullcontext}
    weights |= {ema.name: ema.swapped_in for ema in trainer.emas}
    if averages_itself(trainer.optimizer):
        weights[OWN_AVERAGE] = partial(evaluating, trainer.optimizer)
    best = next(iter([*list(weights)[1:], "raw"]))
    weights = {name: partial(resharded, trainer.network, in_place) for name, in_place in weights.items()}
    prompts, count = list(config.validation.validation_prompts), config.validation.num_validation_images
    if preview is not None and has_preview(config, model):
        trainer.network.eval()
        # A compiled network would be compiled anew for the number of each sampling step.
        as_written = torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()
        try:
            with weights[best](), torch.no_grad(), as_written:
                drawn_with = _gathered(trainer) if trainer.sharded else model
                # Told to stop, the main process is told so once more below, and the others with it.
                with suppress(Stopped), heeding(drawn_with.unet):
                    if trainer.main:
                        sheet = grid(preview(drawn_with, prompts, list(range(count))), prompts or [""], count)
                        save_png(trainer.folder / PREVIEWS / f"step_{step:06d}.png", sheet)
        finally:
            trainer.network.train()
        trainer.heed()
    if config.data.held_out:
        batches = {
            "held_out_loss": trainer.batches.held_out_batches(HELD_OUT_IMAGES),
            "training_loss": trainer.batches.training_batches(min(HELD_OUT_IMAGES, config.data.held_out)),
        }
        chunk = min(CHUNK, images_at_once(config, trainer.accelerator.num_processes))
        losses = measure(trainer.network, model, batches, weights, config, chunk, trainer.heed)
        trainer.metrics.write({"step": step, **losses})


def _gathered(trainer: "Trainer") -> DiffusionModel:
    """The model, each process with all of its weights, which are otherwise cut over the processes."""
    state = {key: whole(value) for key, value in trainer.network.state_dict().items()}
    model = untrained(trainer.config).to(trainer.device)
    Network(model, trainer.config).to(trainer.device).load_state_dict(state)
    return model
