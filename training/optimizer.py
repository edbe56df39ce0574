"""The optimizer of a run: made from the settings, its rates, and its state as checkpoints hold it."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusion_unet.errors import InputError

from .config import ADAMW, Config, OptimizerConfig
from .imports import load_object
from .muon import Muon, inner_matrix

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices with a fused AdamW
CONFIGURED = {"params", "lr", "peak", "muon"}  # of a group: what the settings say, never what a checkpoint says
LAYOUT = "layout"  # which kinds of state there are, and how many of each: what is missing from the rest is seen by it


def make_optimizer(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), fused where the device has it, with Muon where that is set; or
    the class that the settings name, with their arguments.

    Each group has the peak of its rate in "peak". A parameter is of the group of the first expression of `group_lr`
    that is found in its name, and else the text encoder's ("text."), Muon's, or, of the first group, the rest. What
    an expression chooses AdamW trains, also where Muon is set. A schedule-free optimizer is in train mode.

    Raises InputError, naming the setting, for a class or arguments that do not make an optimizer, and for an
    expression that is invalid or chooses nothing."""
    groups = _groups(config, parameters)
    if config.optimizer == ADAMW:
        return (Muon if config.muon_lr else torch.optim.AdamW)(
            groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
            fused=device.type in FUSED,
        )
    kind: Any = load_object(config.optimizer, "optimizer.optimizer")
    arguments = config.optimizer_args or {}
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise InputError(f"optimizer.optimizer: {config.optimizer} is not a class of torch.optim.Optimizer")
    if reserved := CONFIGURED & arguments.keys():
        raise InputError(f"optimizer.optimizer_args: {min(reserved)} is not for here; rates are settings of their own")
    make: Callable[..., torch.optim.Optimizer] = kind
    try:
        optimizer = make(groups, lr=config.learning_rate, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"optimizer.optimizer_args: {config.optimizer} cannot be made with lr and {arguments}: {line}"
        ) from error
    if averages_itself(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _groups(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    left = dict(parameters)

    def take(names: list[str], peak: float, muon: bool = False) -> dict[str, Any]:
        return {"params": [left.pop(name) for name in names], "lr": peak, "peak": peak, "muon": muon}

    chosen = []
    for pattern, peak in (config.group_lr or {}).items():
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise InputError(f"optimizer.group_lr: {pattern!r} is no regular expression ({error})") from None
        names = [name for name in left if expression.search(name)]
        if not names:
            raise InputError(
                f"optimizer.group_lr: {pattern!r} is found in no parameter that the ones before it leave; names are"
                f" such as {next(iter(parameters))}"
            )
        chosen.append(take(names, peak))
    text_peak = config.learning_rate if config.text_encoder_lr is None else config.text_encoder_lr
    text = take([name for name in left if name.startswith("text.")], text_peak)
    matrices = take(
        [name for name, parameter in left.items() if config.muon_lr and inner_matrix(name, parameter)],
        config.muon_lr or 0.0,
        muon=True,
    )
    rest = take(list(left), config.learning_rate)
    return [group for group in (rest, text, matrices, *chosen) if group["params"]]


def rate_course(config: Config) -> Callable[[int], float]:
    """The share of the peak rate as a function of the optimizer steps done, by diffusers' get_scheduler.

    A step is `train_batch_size` images on all processes together, so it is the same course on any number of them."""
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


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Gives every group this share of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def averages_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights to use are others than those it trains, as for schedule-free ones (arXiv:2405.15682)."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the parameters are those to look at, draw with and export; afterwards those to train, as before.

    They are other ones, and a copy is held, only where the optimizer averages them itself. A checkpoint to resume from
    is taken outside of it."""
    if not averages_itself(optimizer):
        yield
        return
    # Its own way back rounds: whoever looks at the weights would change the run.
    trained = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, values in trained:
                parameter.copy_(values)


def state_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a run needs to go on with its present parameters bit for bit: tensors, and what JSON holds.

    Entries are named "<key>.<parameter>", such as "exp_avg.unet.conv_in.weight", and "<key>.group.<number>" for what
    has changed in a group since it was made. The tensors are the live ones, sharded where the parameters are. Raises
    InputError for a class that keeps anything else."""
    owners = {f"group.{number}": _changes(optimizer, group) for number, group in enumerate(optimizer.param_groups)}
    names: dict[Any, str] = {parameter: name for name, parameter in parameters.items()}
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise _unsavable(optimizer, "state that belongs to no parameter")
        owners[names[parameter]] = dict(state)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {LAYOUT: dict(Counter(_layout(kept) for kept in owners.values() if kept))}
    storages: set[int] = set()
    for owner, kept in owners.items():
        for key, value in kept.items():
            entry = f"{key}.{owner}"
            if "." in key:
                raise _unsavable(optimizer, f"{key} of {owner}, a name with a dot")
            if _plain_tensor(value, parameters.get(owner)):
                tensors[entry] = _unshared(value.detach(), storages)
            elif value is None or isinstance(value, bool | int | float | str):
                finite = not isinstance(value, float) or math.isfinite(value)
                scalars[entry] = value if finite else {"float": repr(value)}  # which is no JSON
            else:
                raise _unsavable(optimizer, f"{key} of {owner}, a {type(value).__name__}")
    return tensors, scalars


def _plain_tensor(value: Any, parameter: Tensor | None) -> bool:
    """Whether safetensors holds all of it; of sharded ones, only those that are cut as their parameter is."""
    if isinstance(value, DTensor):
        return parameter is not None and value.shape == parameter.shape
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided


def _changes(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a group is not as the optimizer was made, which is then no setting but state."""

    def changed(key: str, value: Any) -> bool:
        if isinstance(value, Tensor) or key not in optimizer.defaults:
            return True
        default = optimizer.defaults[key]
        return type(value) is not type(default) or bool(value != default)

    return {key: value for key, value in group.items() if key not in CONFIGURED and changed(key, value)}


def _layout(kept: Mapping[str, Any]) -> str:
    return " ".join(sorted(kept))


def _unshared(tensor: Tensor, storages: set[int]) -> Tensor:
    """A copy if an earlier tensor has the same memory, which safetensors refuses (8-bit code books are shared)."""
    if isinstance(tensor, DTensor):
        return tensor
    address = tensor.untyped_storage().data_ptr()
    if address in storages:
        return tensor.clone()
    storages.add(address)
    return tensor


def _unsavable(optimizer: torch.optim.Optimizer, what: str) -> InputError:
    kind = type(optimizer)
    return InputError(f"optimizer.optimizer: {kind.__module__}:{kind.__name__} keeps {what}, which cannot be saved")


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    source: str,
) -> None:
    """Puts the optimizer into the state that `state_tensors` gave, on the parameters' devices; the tensors are copied.

    Raises InputError, which begins with `source`, for state that is not whole or not of these parameters; the optimizer
    is then as it was."""
    groups = {f"group.{number}": group for number, group in enumerate(optimizer.param_groups)}
    owners: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry, value in [*tensors.items(), *scalars.items()]:
        if entry != LAYOUT:
            key, _, owner = entry.partition(".")
            if owner not in parameters and (owner not in groups or key in CONFIGURED):
                raise InputError(f"{source}: {entry} is not part of this run's optimizer")
            owners[owner][key] = _number(value, entry, source)
    layout = scalars.get(LAYOUT)
    for owner, kept in owners.items():
        if not isinstance(layout, dict) or _layout(kept) not in layout:
            raise InputError(f"{source}: of {owner} it holds {_layout(kept)}, which is not the whole of its state")
    if dict(Counter(_layout(kept) for kept in owners.values())) != layout:
        raise InputError(f"{source}: state for {len(owners)} parameters and groups is there, not for all of them")
    changes = {owner: owners.pop(owner, {}) for owner in groups}
    group_of = {parameter: group for group in groups.values() for parameter in group["params"]}
    states: dict[Tensor, Any] = {
        parameter: {key: _placed(key, value, parameter, group_of[parameter]) for key, value in kept.items()}
        for parameter, kept in ((parameters[owner], kept) for owner, kept in owners.items())
    }
    optimizer.state.clear()
    optimizer.state.update(states)
    for owner, group in groups.items():
        made = {key: value for key, value in group.items() if key in CONFIGURED}
        device = group["params"][0].device
        changed = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in changes[owner].items()}
        group.clear()
        group.update({**optimizer.defaults, **made, **changed})


def _number(value: Any, entry: str, source: str) -> Any:
    """A value as it was before it was made fit for JSON. Raises InputError."""
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return value
    if isinstance(value, dict) and value.get("float") in ("inf", "-inf", "nan"):
        return float(value["float"])
    raise InputError(f"{source}: {entry} is a {type(value).__name__}, where a number was expected")


def _placed(key: str, value: Any, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    """A copy of a tensor of the state where the optimizer would have made it, in the memory order of the parameter."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and value.ndim == 0:  # torch's optimizers count on the CPU unless a kernel reads the number
        return value.to(parameter.device if group.get("fused") or group.get("capturable") else "cpu", copy=True)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
