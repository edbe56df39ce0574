"""The training run: steps, checkpoints, previews.

An optimizer step takes the mean over the `train_batch_size` images of that step, whatever the number of processes and
micro-batches. What an image contributes is drawn at its address (plan.py), so the state of a run is the weights, their
averages, the optimizer's moments, and one integer: the images seen.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_unet.checkpoint import write_bytes
from diffusion_unet.errors import InputError, NonFiniteError, SaveError, Stopped
from diffusion_unet.images import grid, save_png
from diffusion_unet.model import DiffusionModel

from . import checkpoint, data
from .batches import Batch, Batches, encode
from .config import Config, changed, to_dict
from .ema import EMA
from .engine import StopSignal, locked, make_accelerator, make_optimizer, moments, rate_course
from .evaluate import held_out_loss
from .network import Network, new_channels, new_model, refuse_other_inputs, trains_text
from .objective import image_losses

Preview = Callable[[DiffusionModel, list[str], list[int]], list[Image]]

BASE, METRICS, PREVIEWS, BAD = "base", "metrics.jsonl", "previews", "bad.jsonl"
HELD_OUT_IMAGES = 256  # at most, of a held-out loss
NAMED = 4  # images that a message names


def train(config: Config, *, preview: Preview | None = None, progress: bool = True) -> Path:
    """Trains until `max_train_steps` and returns the run folder; goes on from the newest whole checkpoint there.

    preview(model, prompts, seeds) draws the grid of `validation_prompts`, prompt by prompt. A run that is finished is
    left as it is. Raises InputError for settings, data or a resume that cannot be, NonFiniteError before a step that
    would spoil the weights, SaveError, and Stopped after SIGTERM or Ctrl-C, once the state has been saved."""
    accelerator = make_accelerator(config)
    run = Path(config.train.output_dir)
    say = _say if accelerator.is_main_process else _keep_quiet
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(run))
            checkpoint.sweep(run)
        accelerator.wait_for_everyone()
        found = checkpoint.load(run, say)
        if found:
            _refuse_changes(found, config)
            if found.state["step"] > config.train.max_train_steps:
                raise InputError(
                    f"train.max_train_steps: {config.train.max_train_steps}, and {found.path} has taken more: raise it,"
                    " or take another train.output_dir"
                )
        if not found or found.state["look_due"] or found.state["step"] < config.train.max_train_steps:
            Trainer(config, accelerator, found, progress=progress, say=say).run(preview)
        say(f"{run}: finished, {config.train.max_train_steps} steps")
    return run


class Trainer:
    """One process's part of a run; `found` is the checkpoint to go on from."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        found: checkpoint.Checkpoint | None = None,
        *,
        progress: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.config, self.accelerator, self.say = config, accelerator, say
        self.folder = Path(config.train.output_dir)
        self.progress = progress and accelerator.is_main_process
        pretrained = self._pretrained(found)
        channels = pretrained.codec.channels if pretrained else new_channels(config.model, config.data.resolution)
        self.dataset = self._inspect(channels)
        if found and found.state.get("data") != self.dataset.fingerprint:
            raise InputError(
                f"{found.path}: data.train_data_dir: images or captions are not those that the run began with"
            )
        self.model = (pretrained or self._new_model(found is not None)).to(accelerator.device)
        self._check_prompts()
        self.batches = Batches(config, self.dataset, self.model, accelerator.process_index, accelerator.num_processes)
        if self.batches.cut:
            say(f"{self.batches.cut} captions are longer than the text encoder reads, and are cut")
        self.network = Network(self.model, trains_text(config.model)).train()
        if config.train.channels_last:
            self.network.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = self.network.trained()
        self.ema = None if config.train.ema_decay is None else EMA(self.parameters, config.train.ema_decay)
        self.optimizer = make_optimizer(config.optimizer, self.parameters, accelerator.device)
        self.course = rate_course(config)
        self.steps_done, self.seconds = 0, 0.0
        self.look_due = False  # whether the preview and the held-out loss of these weights are still to be made
        if found:
            self._restore(found)
        self.wrapped, self.prepared = accelerator.prepare(self.network, self.optimizer)
        self.dropout = self.network.has_dropout()

    # ---- before the first step ----

    def _pretrained(self, found: checkpoint.Checkpoint | None) -> DiffusionModel | None:
        folder = self.config.model.pretrained
        if folder is None:
            self.pretrained = None
            return None
        model = DiffusionModel.load(folder, dtype=torch.float32)
        refuse_other_inputs(model.unet.config, "model.pretrained")
        self.pretrained = model.fingerprint()
        if found and found.state.get("pretrained") != self.pretrained:
            raise InputError(f"{found.path}: model.pretrained: {folder} is not the model that the run began with")
        return model

    def _check_prompts(self) -> None:
        prompts = list(self.config.validation.validation_prompts)
        if self.model.text is None:
            if prompts:
                raise InputError("validation.validation_prompts: the model has no text encoder; take them out")
            return
        try:
            self.model.text.tokenize(prompts, refuse_long=True)
        except InputError as error:
            raise InputError(f"validation.validation_prompts: {error}") from None

    def _inspect(self, channels: int) -> data.Dataset:
        config = self.config.data

        def watch(looks: Iterator[Any], count: int) -> Iterator[Any]:
            return iter(tqdm(looks, "looking at images", count, leave=False, disable=not self.progress, delay=2))

        dataset = data.inspect(data.open_source(config, channels), config, channels, watch)
        if dataset.bad and self.accelerator.is_main_process:
            lines = "".join(json.dumps(bad._asdict()) + "\n" for bad in dataset.bad)
            write_bytes(self.folder / BAD, lines.encode())
        for line in data.describe_bad(dataset.bad, self.folder / BAD):
            self.say(line)
        refusal = data.too_many_bad(dataset, config)
        if refusal:
            raise InputError(refusal)
        return dataset

    def _new_model(self, resumed: bool) -> DiffusionModel:
        """A model with new weights. It is kept in the run folder: tokenizer and pixel statistics are the run's."""
        if self.accelerator.is_main_process and not resumed:
            new_model(self.config.model, self.dataset, self.config.train.seed).save(self.folder / BASE)
        self.accelerator.wait_for_everyone()
        return DiffusionModel.load(self.folder / BASE, dtype=torch.float32)

    # ---- the run ----

    def run(self, preview: Preview | None = None) -> None:
        """Trains to the end. Errors as of `train`."""
        config = self.config
        batch_size, last = config.train.train_batch_size, config.train.max_train_steps
        self._trim_metrics()
        bar = tqdm(
            total=last * batch_size,
            initial=self.steps_done * batch_size,
            unit=" images",
            unit_scale=True,
            desc=self.folder.name,
            disable=not self.progress,
        )
        smooth = None
        with StopSignal() as stop, bar:
            if self.look_due:  # the run was stopped before it could
                self._look(preview)
                self.save()
            begun = time.perf_counter() - self.seconds
            for batch in self.batches.ahead(self.steps_done, last):
                record = self.step(batch)
                self.seconds = time.perf_counter() - begun
                smooth = record["loss"] if smooth is None else 0.98 * smooth + 0.02 * record["loss"]
                bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
                bar.update(batch_size)
                self._log({"step": self.steps_done, **record, "seconds": round(self.seconds, 3)})
                ended = self.steps_done == last
                self.look_due = ended or self.steps_done % config.validation.validation_steps == 0
                stopped = self._anyone(stop.stopped)
                if self.look_due and not stopped:
                    self._look(preview)
                    stopped = self._anyone(stop.stopped)
                if stopped or ended or self.steps_done % config.train.checkpointing_steps == 0:
                    self.save()
                if stopped and (self.look_due or not ended):
                    raise Stopped(
                        f"{self.folder}: stopped at step {self.steps_done}, and saved; the same command goes on"
                    )

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step with this process's part of it. Raises NonFiniteError before any weight is touched."""
        config, accelerator = self.config, self.accelerator
        parts = min(config.train.gradient_accumulation_steps, len(batch.indices))
        losses = []
        for number in range(parts):
            with nullcontext() if number == parts - 1 else accelerator.no_sync(self.wrapped):
                losses.append(self._backward(batch.part(number, parts)))
        own = torch.cat(losses)
        limit = config.optimizer.max_grad_norm
        norm = accelerator.clip_grad_norm_(list(self.parameters.values()), math.inf if limit is None else limit)
        mean = accelerator.reduce(own.sum(), "sum") / config.train.train_batch_size
        loss, grad_norm = torch.stack([mean, norm.to(mean)]).tolist()
        # With a scaled loss (fp16) an infinite gradient is expected: the scale is lowered and the step left out.
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or accelerator.scaler):
            raise self._non_finite(batch, own, loss, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.course(self.steps_done)
        rate = self.optimizer.param_groups[0]["lr"]
        self.prepared.step()
        self.prepared.zero_grad()
        self.steps_done += 1
        if self.ema:
            self.ema.update(self.steps_done)
        return {"loss": loss, "lr": rate, "grad_norm": grad_norm if math.isfinite(grad_norm) else -1.0}

    def _backward(self, batch: Batch) -> Tensor:
        """Adds to the gradients, and returns the losses of the images [B]."""
        device, sigma = self.accelerator.device, batch.sigma
        x0, noise = encode(batch, self.model, device), batch.noise.to(device)
        if self.config.train.channels_last:
            x0, noise = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x0, noise))
        x = x0 + sigma.to(device, torch.float32).view(-1, 1, 1, 1) * noise
        target = self.model.schedule.target(x0, noise, sigma)
        ids = None if batch.ids is None else batch.ids.to(device)
        with torch.random.fork_rng(enabled=self.dropout):
            if self.dropout:
                torch.manual_seed(self.config.train.seed + batch.indices.start)
            output = self.wrapped(x, sigma, ids)
        losses = image_losses(output, target, batch.weight)
        # Processes average their gradients, and the mean is over all images of the step.
        share = self.accelerator.num_processes / self.config.train.train_batch_size
        self.accelerator.backward(losses.sum() * share)
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

    def _anyone(self, flag: bool) -> bool:
        """Whether any process says so; all of them get the same answer."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum"))

    # ---- what is written ----

    def save(self) -> None:
        """Writes a checkpoint, by the main process. Raises SaveError, and NonFiniteError where weights are spoilt."""
        if self.accelerator.is_main_process:
            self._check_weights()
            scaler = self.accelerator.scaler
            state = {
                "images_seen": self.steps_done * self.config.train.train_batch_size,
                "seconds": self.seconds,
                "data": self.dataset.fingerprint,
                "pretrained": self.pretrained,
                "samples": len(self.dataset),
                "look_due": self.look_due,
                "scaler": scaler.state_dict() if scaler else None,
                "config": to_dict(self.config),
            }
            limit = self.config.train.checkpoints_total_limit
            checkpoint.save(self.folder, self.steps_done, state, self._tensors(), limit)
        self.accelerator.wait_for_everyone()

    def _check_weights(self) -> None:
        tensors = self._tensors()
        for name, tensor in (pair for part, pairs in tensors.items() if part != "optimizer" for pair in pairs.items()):
            if not tensor.square().sum().isfinite():  # so large that squares overflow is as useless as infinite
                raise NonFiniteError(
                    f"step {self.steps_done}: the weights {name} are infinite, or nearly, and nothing was saved:"
                    " lower optimizer.learning_rate"
                )

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the run's state, by file: the live ones, so that copying into them restores it."""
        averages = {f"ema_{self.ema.name}": self.ema.state()} if self.ema else {}
        return {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            **averages,
            "optimizer": moments(self.optimizer, self.parameters),
        }

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        """Takes the state over from a checkpoint, after all of it was checked."""
        live = self._tensors()
        for name, tensors in live.items():
            source = f"{found.path / name}.safetensors"
            if name not in found.tensors:
                raise InputError(f"{source}: missing, and this run needs it")
            checkpoint.check_tensors(tensors, found.tensors[name], source)
        for name, tensors in live.items():
            for key, tensor in tensors.items():
                tensor.copy_(found.tensors[name][key])
        self.steps_done, self.seconds = found.state["step"], found.state["seconds"]
        self.look_due = found.state["look_due"]
        if self.accelerator.scaler and found.state["scaler"]:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])

    def _trim_metrics(self) -> None:
        """Takes out what was logged after the checkpoint: those steps are done again."""
        path = self.folder / METRICS
        if self.accelerator.is_main_process and path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            write_bytes(path, b"".join(line for line in lines if step_of(line) <= self.steps_done))

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            try:
                with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise SaveError(f"{self.folder / METRICS}: cannot be written ({error.strerror})") from error

    def _look(self, preview: Preview | None) -> None:
        """The preview grid and the held-out loss. Where they fail, the run is saved before the error is raised."""
        if self.accelerator.is_main_process:
            self._check_weights()
            try:
                self._draw_and_measure(preview)
            except Exception:  # whatever it was, the weights are as they were
                self.save()
                raise
        self.look_due = False
        self.accelerator.wait_for_everyone()

    def _draw_and_measure(self, preview: Preview | None) -> None:
        """With the averaged weights where there are any."""
        prompts, count = list(self.config.validation.validation_prompts), self.config.validation.num_validation_images
        self.network.eval()
        with self.ema.swapped_in() if self.ema else nullcontext(), torch.no_grad():
            if preview is not None and prompts:
                images = preview(self.model, prompts, list(range(count)))
                save_png(self.folder / PREVIEWS / f"step_{self.steps_done:06d}.png", grid(images, prompts, count))
            batch = self.batches.held_out_batch(HELD_OUT_IMAGES)
            if batch is not None:
                losses = held_out_loss(self.network, self.model, batch, self.config.objective)
                self._log({"step": self.steps_done, "held_out_loss": losses})
        self.network.train()


def _refuse_changes(found: checkpoint.Checkpoint, config: Config) -> None:
    changes = changed(found.state.get("config", {}), to_dict(config))
    if changes:
        raise InputError(f"{found.path}: it cannot go on with {'; '.join(changes)}: take another train.output_dir")


def step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinity for a line that was cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    return record.get("step", math.inf) if isinstance(record, dict) else math.inf


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def _keep_quiet(message: str) -> None:
    """What the other processes do with messages."""
