"""What a run will hold in memory and on disk, without its weights or activations ever being there."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from diffusion_unet.attention import Transformer2DModel
from diffusion_unet.codec import LatentCodec
from diffusion_unet.layers import ResnetBlock2D
from diffusion_unet.model import DiffusionModel

from . import checkpoint
from .batches import Batch
from .config import Config
from .network import Network
from .optimizer import averages_itself, make_optimizer, state_tensors

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
META = torch.device("meta")


@dataclass(frozen=True)
class Footprint:
    """Of one process that computes `images` at a time; bytes, but for the two numbers of parameters."""

    parameters: int
    trained: int
    images: int
    weights: int  # of all parts, frozen ones too
    gradients: int
    averages: int
    optimizer: int | None  # None: its class does not say without being run
    activations: int  # kept from the forward for the backward pass
    base: int  # of a new run's model as it was before the first step, on disk
    checkpoint: int  # of one checkpoint, without the optimizer's state where that is not known

    @property
    def memory(self) -> int:
        """All of the above in memory; what single operations need besides, and the framework itself, are not in it."""
        return self.weights + self.gradients + self.averages + (self.optimizer or 0) + self.activations


def footprint(config: Config, model: DiffusionModel, batch: Batch) -> Footprint:
    """The footprint of a run on one process.

    model: as the run begins with, its weights anywhere, also on the meta device; its `requires_grad` are set. batch:
    any one of the run, of which the sizes are taken. Raises InputError where the settings make no optimizer, or one
    whose state cannot be saved."""
    # Without its checkpoints in between, which would hide what is kept inside them.
    train = dataclasses.replace(config.train, gradient_checkpointing=False)
    network = Network(model, dataclasses.replace(config, train=train)).train()
    vae = model.codec.vae if isinstance(model.codec, LatentCodec) else None
    parts = [network] if vae is None else [network, vae]
    everything = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    trained = network.trained()
    count = len(config.train.ema)
    averaged = _bytes(value for name, value in trained.items() if not name.startswith("uncertainty."))
    optimizer, own_average = _optimizer(config, trained)
    images = -(-config.train.train_batch_size // config.train.gradient_accumulation_steps)
    return Footprint(
        parameters=sum(tensor.numel() for part in parts for tensor in part.parameters()),
        trained=sum(tensor.numel() for tensor in trained.values()),
        images=images,
        weights=_bytes(everything),
        gradients=_bytes(trained.values()),
        averages=count * averaged,
        optimizer=optimizer,
        activations=_activations(network, config, batch, images),
        base=_bytes(everything),
        checkpoint=checkpoint.SPARE_BYTES
        + _bytes(trained.values())
        + (count + own_average) * averaged
        + (optimizer or 0),
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer(config: Config, trained: Mapping[str, nn.Parameter]) -> tuple[int | None, bool]:
    """Bytes of the optimizer's state after a step, and whether it keeps an average of the weights besides.

    It takes the step with tensors that hold nothing. Some classes look at values, and then it is not known."""
    twins = {name: nn.Parameter(torch.empty_like(value, device=META)) for name, value in trained.items()}
    optimizer = make_optimizer(config.optimizer, twins, META)
    for twin in twins.values():
        twin.grad = torch.empty_like(twin)
    own_average = averages_itself(optimizer)
    try:
        optimizer.step()
    except Exception:  # whatever it is, it says nothing about a step with values
        return None, own_average
    return _bytes(state_tensors(optimizer, twins)[0].values()), own_average


def _activations(network: Network, config: Config, batch: Batch, images: int) -> int:
    """Bytes that the forward pass of `images` images keeps for the backward pass."""

    def repeated(value: Tensor) -> Tensor:
        return value[:1].expand(images, *value.shape[1:])

    names = ("ids", "context", "pooled", "time_ids")
    inputs = {name: repeated(value) for name in names if (value := getattr(batch, name)) is not None}
    dtype = next(iter(network.trained().values())).dtype
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    _, channels, height, width = batch.noise.shape
    further = network.unet.config.in_channels - channels
    with fakes:
        own = {
            name: nn.Parameter(torch.empty(value.shape, dtype=value.dtype), value.requires_grad)
            for name, value in network.named_parameters()
        }
        fixed = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in network.named_buffers()}
        x = torch.empty(images, channels, height, width, dtype=dtype)
        if further:
            inputs["extra"] = torch.empty(images, further, height, width, dtype=dtype)
    kept = _Kept([*own.values(), *fixed.values()])
    half = HALVES.get(config.train.mixed_precision)
    precision = torch.autocast("cpu", half, enabled=half is not None)
    with kept.of(network), torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor), precision:
        functional_call(network, own | fixed, (x, repeated(batch.sigma)), inputs)
    return kept.total(config.train.gradient_checkpointing)


class _Kept:
    """Memory that is kept for the backward pass, each storage once, by the block that keeps it."""

    def __init__(self, known: list[Tensor]):
        self.seen = {_storage(tensor) for tensor in known}  # weights, which are there anyway
        self.inside: dict[nn.Module | None, int] = defaultdict(int)
        self.given: dict[int, int] = {}  # inputs of blocks
        self.held: list[Tensor] = []  # whose storages would else be taken for others that come after them
        self.block: nn.Module | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self.seen:
            self.seen.add(key)
            self.held.append(tensor)
            self.inside[self.block] += tensor.untyped_storage().nbytes()
        return tensor

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """Within it the blocks that gradient checkpointing computes anew are told from the rest."""

        def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.block = module
            for value in arguments:
                if isinstance(value, Tensor):
                    self.held.append(value)
                    self.given[_storage(value)] = value.untyped_storage().nbytes()

        def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self.block = None

        blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D | Transformer2DModel)]
        hooks = [block.register_forward_pre_hook(enter) for block in blocks]
        hooks += [block.register_forward_hook(leave) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def total(self, computed_anew: bool) -> int:
        """computed_anew: a block keeps its inputs only, but for the one whose backward pass is under way."""
        blocks = [size for block, size in self.inside.items() if block is not None]
        if not computed_anew:
            return self.inside[None] + sum(blocks)
        return self.inside[None] + sum(self.given.values()) + max(blocks, default=0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
