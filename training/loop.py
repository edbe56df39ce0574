"""The training run: steps, checkpoints, previews.

An optimizer step takes the mean over the `train_batch_size` images of that step, whatever the number of processes and
micro-batches. What an image contributes is drawn at its address (plan.py), so the state of a run is the weights, their
averages, the optimizer's moments, and one integer: the images seen.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from diffusion_unet.errors import InputError, NonFiniteError, Stopped

from . import checkpoint
from .batches import Batch, Batches, encode, told
from .config import Config, to_dict
from .ema import make_emas
from .engine import (
    StopSignal,
    by_main,
    cut_as,
    kept,
    locked,
    make_accelerator,
    own_part,
    put,
    stopping,
    told_to_stop,
    whole,
)
from .evaluate import level_losses
from .heartbeat import watched
from .looking import OWN_AVERAGE, Preview, draw_and_measure
from .metrics import LEVELS_EVERY, Metrics, open_trackers
from .network import Network
from .objective import huber_c, image_losses
from .optimizer import averages_itself, evaluating, load_state, make_optimizer, rate_course, set_rates, state_tensors
from .precompute import keep_latents, keep_texts
from .prior import fill_class_images
from .resume import Change, changes_of, changes_of_data, check_allowed, refuse_other_model, tell
from .start import check_paths, shown, start
from .stream import StreamBatches
from .uncertainty import weigh

NAMED = 4  # images that a message names


def train(
    config: Config, *, preview: Preview | None = None, progress: bool = True, allow_change: Sequence[str] = ()
) -> Path:
    """Trains until `max_train_steps` and returns the run folder; goes on from the newest whole checkpoint there.

    preview(model, prompts, seeds) draws the grid of `validation_prompts`, prompt by prompt. allow_change: settings that
    may differ from those of the checkpoint, which is recorded. A run that is finished is left as it is. Raises
    InputError for settings, data or a resume that cannot be, NonFiniteError before a step that would spoil the weights,
    SaveError, and Stopped after SIGTERM or Ctrl-C, once the state has been saved."""
    check_allowed(allow_change)
    accelerator = make_accelerator(config)
    run = Path(config.train.output_dir)
    say = _say if accelerator.is_main_process else lambda message: None
    with ExitStack() as stack:
        stack.enter_context(StopSignal(run))
        stack.enter_context(watched(accelerator, config.train.heartbeat_timeout))

        def take() -> None:
            stack.enter_context(locked(run))
            checkpoint.sweep(run, config.train.checkpoints_total_limit)

        by_main(accelerator, take)
        found = checkpoint.load(run, say)
        if found:
            checkpoint.check_state(found)
        changes = changes_of(found, config, allow_change) if found else []
        if not found or found.state["look_due"] or found.state["step"] < config.train.max_train_steps:
            check_paths(config)
            fill_class_images(config, accelerator, preview, say)
            trainer = Trainer(
                config, accelerator, found, progress=progress, say=say, changes=changes, allowed=allow_change
            )
            if found:
                found.tensors.clear()  # mapped files, which would keep removed checkpoints on the disk
            trainer.run(preview)
        say(f"{run}: finished, {config.train.max_train_steps} steps")
    return run


class Trainer:
    """One process's part of a run; `found` is the checkpoint to go on from, `changes` how the settings differ from its,
    and `allowed` what else may."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        found: checkpoint.Checkpoint | None = None,
        *,
        progress: bool = False,
        say: Callable[[str], None] = print,
        changes: Sequence[Change] = (),
        allowed: Sequence[str] = (),
    ):
        self.config, self.accelerator, self.say = config, accelerator, say
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.folder = Path(config.train.output_dir)
        self.progress = progress and self.main
        self.dataset, self.model, self.model_before = start(
            config, accelerator, say, progress=self.progress, again=found is not None
        )
        self.changes: list[Change] = []  # of all resumes so far
        if found:
            refuse_other_model(found, config, self.model_before)
            of_data = changes_of_data(found, config.data, self.dataset.fingerprint, allowed)
            self.changes = [*found.state["changes"], *changes, *of_data]
            for line in tell([*changes, *of_data]):
                say(line)
        make = partial(StreamBatches, say=say) if config.data.streaming == "pure" else Batches
        self.batches = make(config, self.dataset, self.model, accelerator.process_index, accelerator.num_processes)
        keep_latents(self.batches, accelerator, shown("encoding images", self.progress))
        keep_texts(self.batches, accelerator, shown("encoding captions", self.progress))
        self._prepare()
        self.course = rate_course(config)
        self.steps_done, self.seconds = 0, 0.0
        self.look_due = False  # whether the preview and the held-out loss of these weights are still to be made
        self.levels = level_losses(self.model.schedule, config, reduce=self._sum, main=self.main)
        if found:
            self._restore(found)
        trackers = open_trackers(accelerator, self.folder, to_dict(config), self.steps_done)
        self.metrics = Metrics(self.folder, main=self.main, trackers=trackers)

    # ---- before the first step ----

    def _prepare(self) -> None:
        """The network, its optimizer and its averages, on the device and over the processes."""
        config, accelerator = self.config, self.accelerator
        network = Network(self.model, config).to(self.device).train()
        network.shrink_frozen(config.train.mixed_precision)
        if config.train.channels_last and not accelerator.is_fsdp2:  # which cuts contiguous weights only
            network.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.train.compile:
            self.say("the U-Net is compiled at its first step, which may take minutes")
            network.unet.compile()
        if accelerator.is_fsdp2:  # accelerate does it for the others only
            network.forward = accelerator.autocast()(network.forward)  # type: ignore[method-assign]
        optimizer = make_optimizer(config.optimizer, network.trained(), self.device)
        self.wrapped, self.prepared = accelerator.prepare(network, optimizer)
        self.optimizer = self.prepared.optimizer
        # What was prepared may have other parameters: cut over the processes.
        self.network: Network = accelerator.unwrap_model(self.wrapped, keep_torch_compile=False)
        self.parameters = self.network.trained()
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters.values())
        averaged = {n: own_part(value) for n, value in self.parameters.items() if not n.startswith("uncertainty.")}
        self.emas = make_emas(config.train.ema, averaged)
        self.dropout = self.network.has_dropout()

    # ---- the run ----

    def run(self, preview: Preview | None = None) -> None:
        """Trains to the end. Errors as of `train`."""
        config = self.config
        batch_size, last = config.train.train_batch_size, config.train.max_train_steps
        self.metrics.trim(self.steps_done, looked=not self.look_due)
        bar = tqdm(
            total=last * batch_size,
            initial=self.steps_done * batch_size,
            unit=" images",
            unit_scale=True,
            desc=self.folder.name,
            disable=not self.progress,
        )
        smooth = None
        with closing(self.metrics), bar:
            if self.look_due:  # the run was stopped before it could
                self._look(preview)
                self.save()
            if self._told_to_stop():
                raise stopping()
            begun = time.perf_counter() - self.seconds
            for batch in self.batches.ahead(self.steps_done, last):
                record = self.step(batch)
                self.seconds = time.perf_counter() - begun
                smooth = record["loss"] if smooth is None else 0.98 * smooth + 0.02 * record["loss"]
                bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
                bar.update(batch_size)
                levels = {"levels": self.levels.take()} if self.steps_done % LEVELS_EVERY == 0 else {}
                self.metrics.write({"step": self.steps_done, **record, "seconds": round(self.seconds, 3), **levels})
                ended = self.steps_done == last
                self.look_due = ended or self.steps_done % config.validation.validation_steps == 0
                stopped = self._told_to_stop()
                if self.look_due and not stopped:
                    self._look(preview)
                    stopped = self._told_to_stop()
                if stopped or ended or self.steps_done % config.train.checkpointing_steps == 0:
                    self.save()
                if stopped and (self.look_due or not ended):
                    raise self.batches.fault() or Stopped(
                        f"{self.folder}: stopped at step {self.steps_done}, and saved; the same command goes on"
                    )

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step with this process's part of it. Raises NonFiniteError before any weight is touched."""
        config, accelerator = self.config, self.accelerator
        # As many on every process: where weights are cut over the processes, each pass is one of all of them.
        smallest = config.train.train_batch_size // accelerator.num_processes
        parts = min(config.train.gradient_accumulation_steps, smallest)
        losses = []
        for number in range(parts):
            with nullcontext() if number == parts - 1 else accelerator.no_sync(self.wrapped):
                losses.append(self._backward(batch.part(number, parts)))
        own = torch.cat(losses)
        limit = config.optimizer.max_grad_norm
        norm = accelerator.clip_grad_norm_(list(self.parameters.values()), math.inf if limit is None else limit)
        mean = accelerator.reduce(own.sum(), "sum") / config.train.train_batch_size
        loss, grad_norm = torch.stack([mean, whole(norm).to(mean)]).tolist()
        # With a scaled loss (fp16) an infinite gradient is expected: the scale is lowered and the step left out.
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or accelerator.scaler):
            raise self._non_finite(batch, own, loss, grad_norm)
        set_rates(self.optimizer, self.course(self.steps_done))
        rate = self.optimizer.param_groups[0]["lr"]
        self.prepared.step()
        self.prepared.zero_grad()
        if accelerator.scaler and accelerator.scaler.get_scale() < 1:
            raise self._non_finite(batch, own, loss, grad_norm)
        if self.steps_done == 0:
            state_tensors(self.optimizer, self.parameters)  # one that cannot be saved fails now
        self.levels.add(batch.sigma, own)
        self.steps_done += 1
        for ema in self.emas:
            ema.update(self.steps_done)
        return {"loss": loss, "lr": rate, "grad_norm": grad_norm}

    def _backward(self, batch: Batch) -> Tensor:
        """Adds to the gradients, and returns the losses of the images [B]."""
        device, sigma = self.device, batch.sigma
        dtype = next(iter(self.parameters.values())).dtype
        x0, noise = encode(batch, self.model, device).to(dtype), batch.noise.to(device, dtype)
        if self.config.train.channels_last:
            x0, noise = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x0, noise))
        x = x0 + sigma.to(device, dtype).view(-1, 1, 1, 1) * noise
        target = self.model.schedule.target(x0, noise, sigma)
        inputs = told(batch, self.model, device)
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=self.dropout):
            if self.dropout:
                torch.manual_seed(self.config.train.seed + batch.indices.start)
            output, u = self.wrapped(x, sigma, **inputs)
        losses = image_losses(output, target, batch.weight, huber_c(self.config.objective))
        # Processes average their gradients, and the mean is over all images of the step.
        share = self.accelerator.num_processes / self.config.train.train_batch_size
        self.accelerator.backward((losses if u is None else weigh(losses, u)).sum() * share)
        return losses.detach()

    def _non_finite(self, batch: Batch, losses: Tensor, loss: float, grad_norm: float) -> NonFiniteError:
        bad = (~losses.isfinite()).nonzero().flatten().tolist() or list(range(len(losses)))
        sigmas = batch.sigma[bad]
        names = [name for place in bad[:NAMED] for name in self.batches.names(batch.indices[place : place + 1])]
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        return NonFiniteError(
            f"step {self.steps_done + 1}: loss {loss:g}, gradient {grad_norm:g}, at sigma {float(sigmas.min()):.3g} to"
            f" {float(sigmas.max()):.3g}, images {', '.join(names)}{more}; no weight was touched: look at them, or"
            " lower optimizer.learning_rate"
        )

    def _sum(self, values: Tensor) -> Tensor:
        """Over all processes, float64 on the CPU."""
        if self.accelerator.num_processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(values.to(self.device), "sum")
        return total.cpu()

    def _anyone(self, flag: bool) -> bool:
        """Whether any process says so; all of them get the same answer."""
        return bool(self._sum(torch.tensor(float(flag))))

    def _told_to_stop(self) -> bool:
        return self._anyone(told_to_stop() or self.batches.fault() is not None)

    def heed(self) -> None:
        """Raises Stopped once a process was told to stop; called between steps, by all where weights are cut."""
        if self._told_to_stop() if self.sharded else told_to_stop():
            raise stopping()

    # ---- what is written ----

    def save(self) -> None:
        """Writes a checkpoint, by the main process. Raises SaveError, and NonFiniteError where weights are spoilt."""
        tensors, scalars = self._state()
        levels = self.levels.state()
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "images_seen": self.steps_done * self.config.train.train_batch_size,
                "seconds": self.seconds,
                "data": self.dataset.fingerprint,
                "model": self.model_before,
                "samples": len(self.dataset),
                "look_due": self.look_due,
                "levels": levels,
                "optimizer": scalars,
                "scaler": scaler.state_dict() if scaler else None,
                "config": to_dict(self.config),
                "changes": self.changes,
            }
            limit = self.config.train.checkpoints_total_limit
            checkpoint.save(self.folder, self.steps_done, state, tensors, limit)
        self.accelerator.wait_for_everyone()

    def _check_weights(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        named = (pair for pairs in tensors.values() for pair in pairs.items())
        # So large that squares overflow is as useless as infinite.
        bad = [name for name, tensor in named if not own_part(tensor).square().sum().isfinite()]
        if self._anyone(bool(bad)) if self.sharded else bad:
            raise NonFiniteError(
                f"step {self.steps_done}: the weights {bad[0] if bad else 'of another process'} are infinite, or"
                " nearly, and nothing was saved: lower optimizer.learning_rate"
            )

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """The live weights and averages by file, so that copying into them restores them."""
        weights = {"model": {name: parameter.detach() for name, parameter in self.parameters.items()}}
        for ema in self.emas:
            weights[f"ema_{ema.name}"] = {n: cut_as(self.parameters[n], part) for n, part in ema.state().items()}
        return weights

    def _state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """All tensors of the run's state by file, whole on the main process; what of the optimizer's state JSON holds.

        Raises NonFiniteError where weights are spoilt."""
        weights = self._weights()
        if averages_itself(self.optimizer):
            with evaluating(self.optimizer):
                weights[f"ema_{OWN_AVERAGE}"] = {name: value.clone() for name, value in weights["model"].items()}
        self._check_weights(weights)
        moments, scalars = state_tensors(self.optimizer, self.parameters)
        parts = {**weights, "optimizer": moments}
        return {part: {k: kept(v, self.main) for k, v in pairs.items()} for part, pairs in parts.items()}, scalars

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        """Takes the state over from a checkpoint, after all of it was checked."""
        live = self._weights()
        for name, tensors in live.items():
            source = f"{found.path / name}.safetensors"
            if name not in found.tensors:
                raise InputError(f"{source}: missing, and this run needs it")
            checkpoint.check_tensors(tensors, found.tensors[name], source)
        source = f"{found.path / 'optimizer'}.safetensors"
        moments = found.tensors.get("optimizer", {})
        load_state(self.optimizer, self.parameters, moments, found.state.get("optimizer", {}), source)
        with torch.no_grad():
            for name, tensors in live.items():
                for key, tensor in tensors.items():
                    put(tensor, found.tensors[name][key])
        self.steps_done, self.seconds = found.state["step"], found.state["seconds"]
        self.look_due = found.state["look_due"]
        self.levels.restore(found.state["levels"])
        if self.accelerator.scaler and found.state["scaler"]:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])

    def _look(self, preview: Preview | None) -> None:
        """The preview grid and the held-out loss, still due where a stop comes between. Where they fail, the run is
        saved before the error is raised."""
        self._check_weights(self._weights())
        cut_short = False
        try:
            if self.main or self.sharded:
                draw_and_measure(self, preview)
        except Stopped:
            cut_short = True
        except Exception:  # whatever it was, the weights are as they were
            if self.accelerator.num_processes == 1:  # others would have to come along
                self.save()
            raise
        self.look_due = self._anyone(cut_short)  # the others wait here


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
