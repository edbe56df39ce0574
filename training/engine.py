"""What a run stands on: devices and processes, the lock on its folder, signals."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs, broadcast, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusion_unet.errors import Failure, InputError, NonFiniteError, SaveError, Stopped

from .config import Config
from .metrics import tracker_settings
from .rendezvous import init_method

NOT_SUPPORTED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")

FAILURES = (InputError, NonFiniteError, SaveError, Stopped)
MESSAGE = 4096  # bytes of an error that the processes tell one another
SAME = 1.0  # seconds


def make_accelerator(config: Config) -> Accelerator:
    """Device, processes and precision, as the environment (accelerate launch, torchrun) says. Raises InputError."""
    if config.train.allow_tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    sharding = _sharding()
    asked, precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), config.train.mixed_precision
    if asked not in ("no", precision):
        raise InputError(
            f"ACCELERATE_MIXED_PRECISION is {asked} and train.mixed_precision {precision}: give"
            f" --train.mixed_precision={asked}, or take mixed_precision out of the accelerate config"
        )
    trackers = tracker_settings(config.train.report_to, Path(config.train.output_dir))
    try:
        accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            fsdp_plugin=sharding,
            # The main process looks, draws and saves alone, while the others wait; heartbeat.py knows whether in vain.
            kwargs_handlers=[InitProcessGroupKwargs(init_method=init_method(), timeout=timedelta(days=1))],
            **trackers,
        )
    except ValueError as error:
        line = " ".join(str(error).split())
        raise InputError(
            f"train.mixed_precision: {config.train.mixed_precision} is not to be had here: {line}"
        ) from None
    if config.train.mixed_precision == "fp16" and accelerator.scaler is None:  # passed over on a CPU, in silence too
        raise InputError("train.mixed_precision: fp16 is not to be had here: it needs a GPU; take bf16, or no")
    if sharding is not None and not accelerator.is_fsdp2:  # which accelerate passes over in silence
        raise InputError(
            "ACCELERATE_USE_FSDP is set: accelerate cuts weights over the GPUs of processes that accelerate launch or"
            f" torchrun started; this is {accelerator.distributed_type.value} on {accelerator.device.type}: take it out"
        )
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


def _sharding() -> FullyShardedDataParallelPlugin | None:
    """How weights are to be cut over the processes, as the environment says. Raises InputError."""
    for name in NOT_SUPPORTED:
        if parse_flag_from_env(name):
            raise InputError(f"{name} is set: training has DDP and FSDP2 only; take it out of the accelerate config")
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise InputError("FSDP_VERSION is 1: put fsdp_version: 2 into the accelerate config")
    for setting in ("cpu_ram_efficient_loading", "activation_checkpointing", "offload_params"):
        if parse_flag_from_env(f"FSDP_{setting.upper()}"):
            remedy = ", and set train.gradient_checkpointing" if setting == "activation_checkpointing" else ""
            raise InputError(f"FSDP_{setting.upper()} is set: take fsdp_{setting} out of the accelerate config{remedy}")
    # Autocast alone, as with DDP: FSDP2's own casts would round sigma, and sum gradients, in the low precision.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return plugin


def by_main(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Has the main process do something while the others wait. Where it fails, all of them raise its Failure."""
    failure: Failure | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Failure as error:
            failure = error
    if accelerator.num_processes > 1:
        text = "" if failure is None else str(failure)
        words = torch.zeros(1 + MESSAGE, dtype=torch.int64, device=accelerator.device)
        words[0] = 0 if failure is None else failure.exit_code
        letters = torch.tensor(list(text.encode()[:MESSAGE]), dtype=torch.int64, device=accelerator.device)
        words[1 : 1 + len(letters)] = letters
        code, *rest = broadcast(words, from_process=0).tolist()
        if code and failure is None:
            message = bytes(rest).rstrip(b"\0").decode(errors="ignore")
            failure = next(kind for kind in FAILURES if kind.exit_code == code)(message)
            failure.told = True  # by the main process
    if failure is not None:
        raise failure


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut over the processes, which then call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def kept(tensor: Tensor, keep: bool) -> Tensor:
    """As `whole`; of one that is cut, processes that `keep` it get it in the CPU's memory, and the others nothing."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if keep else gathered.new_empty(0)


def put(live: Tensor, given: Tensor) -> None:
    """Copies all of a tensor into one that may be cut over the processes."""
    if isinstance(live, DTensor):
        given = distribute_tensor(given.to(live.device), live.device_mesh, live.placements)
    live.copy_(given)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be cut over the processes: the memory itself, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_as(example: Tensor, part: Tensor) -> Tensor:
    """The tensor of `example`'s shape of which `part` is this process's part, as `own_part` gives it."""
    if not isinstance(example, DTensor):
        return part
    mesh, placements = example.device_mesh, example.placements
    return DTensor.from_local(part, mesh, placements, shape=example.shape, stride=example.stride())


@contextmanager
def resharded(network: nn.Module, in_place: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """`in_place`, after which no weight stays gathered from its parts: the next pass has those of that moment.

    FSDP2 keeps what it gathered of the outermost module until a backward pass, and looks at the parts no more."""
    try:
        with in_place():
            yield
    finally:
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """The run folder for this process alone; the lock ends with the process. Raises InputError, SaveError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise SaveError(
            f"{run}: the run folder cannot be made ({error.strerror}): give another train.output_dir"
        ) from error
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
    """Within it SIGTERM and SIGINT only set `stopped`, for `heed` and the loop; another one does what it always did.

    Signals within a second of the first are the same one, told twice: launchers pass on what their group is sent."""

    active: ClassVar["StopSignal | None"] = None  # signals are the process's, and so is this

    def __init__(self, run: Path) -> None:
        self.run, self.stopped = run, False
        self._told = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
            StopSignal.active = self
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped and time.monotonic() - self._told > SAME:
            self._restore()
            signal.raise_signal(number)
        elif not self.stopped:
            self.stopped, self._told = True, time.monotonic()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
        StopSignal.active = None


def told_to_stop() -> bool:
    """Whether this process was, within a StopSignal."""
    return StopSignal.active is not None and StopSignal.active.stopped


def stopping() -> Stopped:
    """What a run that was told to stop is ended with where it has nothing to save."""
    assert StopSignal.active is not None
    return Stopped(f"{StopSignal.active.run}: stopped; the same command goes on")


def heed() -> None:
    """Raises Stopped once this process was told to stop: for whatever takes long before the first step."""
    if told_to_stop():
        raise stopping()


@contextmanager
def heeding(network: nn.Module) -> Iterator[None]:
    """Within it the network raises Stopped, in the place of a pass, once the process was told to stop."""

    def before(*inputs: Any) -> None:
        heed()

    hook = network.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
