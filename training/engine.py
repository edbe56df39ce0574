"""What a run stands on: devices and processes, the optimizer and its rate, the lock on its folder, signals."""

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_unet.errors import InputError, SaveError

from .config import Config, OptimizerConfig
from .muon import Muon

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices with a fused AdamW
# Layers that AdamW trains even where Muon trains the others, as its authors have it: the first, the last, embeddings.
OUTER = tuple(
    f"unet.{name}."
    for name in ("conv_in", "conv_out", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj")
)


def make_accelerator(config: Config) -> Accelerator:
    """Device, processes and precision, as the environment (accelerate launch, torchrun) says. Raises InputError."""
    try:
        accelerator = Accelerator(mixed_precision=config.train.mixed_precision)
    except ValueError as error:
        line = " ".join(str(error).split())
        raise InputError(
            f"train.mixed_precision: {config.train.mixed_precision} is not to be had here: {line}"
        ) from None
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {accelerator.gradient_accumulation_steps}: take it out, and set"
            " train.gradient_accumulation_steps"
        )
    if config.train.train_batch_size < accelerator.num_processes:
        raise InputError(
            f"train.train_batch_size: {config.train.train_batch_size} images a step for {accelerator.num_processes}"
            " processes together: raise it"
        )
    return accelerator


def make_optimizer(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], device: torch.device) -> Muon:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), fused where the device has it, with Muon where that is set.

    Its groups, the U-Net's, that of the "text." parameters and that of Muon, have the peak of their rate in "peak"."""
    text = [name for name in parameters if name.startswith("text.")]
    inner = [name for name, parameter in parameters.items() if name not in text and _inner_matrix(name, parameter)]
    matrices = inner if config.muon_lr else []
    rest = [name for name in parameters if name not in {*text, *matrices}]
    text_peak = config.learning_rate if config.text_encoder_lr is None else config.text_encoder_lr
    groups = [
        {"params": [parameters[name] for name in names], "peak": peak, "muon": names is matrices}
        for names, peak in ((rest, config.learning_rate), (text, text_peak), (matrices, config.muon_lr))
        if names
    ]
    return Muon(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=device.type in FUSED,
    )


def _inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """A weight between hidden layers: neither what reads the inputs nor what writes the output."""
    return parameter.ndim >= 2 and not name.startswith(OUTER)


def rate_course(config: Config) -> Callable[[int], float]:
    """The share of the peak rate as a function of the optimizer steps done, by diffusers' get_scheduler."""
    from diffusers.optimization import get_scheduler

    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.optimizer.learning_rate)
    scheduler = get_scheduler(
        config.optimizer.lr_scheduler,
        carrier,
        num_warmup_steps=config.optimizer.lr_warmup_steps,
        num_training_steps=config.train.max_train_steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: float(factor(step))


def moments(optimizer: Muon, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as tensors named "exp_avg.<parameter>"; zeros are put in place before the first step."""
    matrices = {parameter for group in optimizer.param_groups if group["muon"] for parameter in group["params"]}
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            fused = optimizer.param_groups[0]["fused"]
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu", dtype=torch.float32)
            for moment in ("exp_avg",) if parameter in matrices else ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors.update({f"{key}.{name}": tensor for key, tensor in state.items()})
    return tensors


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """The run folder for this process alone; the lock ends with the process. Raises InputError, SaveError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise SaveError(f"{run}: the run folder cannot be made ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{run}: another process is training there; wait, or give another train.output_dir"
            ) from None
        yield
    finally:
        os.close(descriptor)


class StopSignal:
    """Within it SIGTERM and SIGINT only set `stopped`; a second one does what it always did."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
