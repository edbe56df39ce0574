"""Optimizers of any class: their groups, their rates, and that a run broken in two ends where the unbroken one does."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffusion_unet.checkpoint import read_safetensors, write_json, write_safetensors
from diffusion_unet.errors import InputError
from diffusion_unet.untrusted import read_json
from training.config import Config, OptimizerConfig, TrainConfig
from training.optimizer import (
    averages_itself,
    evaluating,
    load_state,
    make_optimizer,
    rate_course,
    set_rates,
    state_tensors,
)

CPU = torch.device("cpu")
STEPS = 6
MATRICES = {"unet.mid_block.attentions.0.to_q.weight": (8, 6), "text.model.fc1.weight": (5, 8)}
SHAPES = {
    **MATRICES,
    "unet.conv_in.weight": (8, 3, 3, 3),
    "unet.mid_block.resnets.0.conv1.weight": (4, 8, 3, 3),
    "unet.mid_block.resnets.0.conv_shortcut.weight": (4, 8, 1, 1),
    "unet.mid_block.resnets.0.conv1.bias": (4,),
    "unet.scale": (),
    "unet.zero.weight": (6, 6),
    "unet.late.weight": (6, 4),
    "text.unused.weight": (2, 3),
}


class WithTable(torch.optim.Optimizer):
    """Each parameter has the same table, as 8-bit optimizers do, and the group a number that is no JSON."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "least": 0.0, "total": 0.0})
        self.table = torch.linspace(0, 1, 7)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["least"] = -math.inf
            group["total"] = group["total"] + torch.ones(())
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("table", self.table)
                    state["name"] = None
                    state["count"] = state.get("count", 0) + 1
                    rate = group["lr"] * state["table"][state["count"]] / group["total"]
                    parameter.sub_(rate * parameter.grad)


CLASSES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, unfused": {"optimizer": "torch.optim.adamw:AdamW"},
    "AdamW with Muon": {"muon_lr": 0.02},
    "SGD": {"optimizer": "torch.optim:SGD", "optimizer_args": {"momentum": 0.9, "nesterov": True}},
    "NAdam": {"optimizer": "torch.optim:NAdam"},
    "Adagrad": {"optimizer": "torch.optim:Adagrad"},
    "Muon of torch": {"optimizer": "torch.optim:Muon"},
    "Adafactor of torch": {"optimizer": "torch.optim:Adafactor"},
    "Adafactor of transformers": {
        "optimizer": "transformers.optimization:Adafactor",
        "optimizer_args": {"relative_step": False, "beta1": 0.9},
    },
    "schedule-free AdamW": {"optimizer": "schedulefree:AdamWScheduleFree", "optimizer_args": {"warmup_steps": 4}},
    "schedule-free SGD": {"optimizer": "schedulefree:SGDScheduleFree"},
    "Prodigy": {"optimizer": "prodigyopt:Prodigy", "learning_rate": 1.0, "optimizer_args": {"d0": 1e-4}},
    "Prodigy, sliced": {"optimizer": "prodigyopt:Prodigy", "learning_rate": 1.0, "optimizer_args": {"slice_p": 11}},
    "a table shared": {"optimizer": "test_optimizer:WithTable"},
}


def parameters_for(name: str) -> dict[str, nn.Parameter]:
    """As they begin; those of convolutions in channels-last memory order."""
    torch.manual_seed(0)
    parameters = {}
    for key, shape in (MATRICES if name == "Muon of torch" else SHAPES).items():
        value = torch.randn(shape) * (0.0 if "zero" in key else 1.0)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        parameters[key] = nn.Parameter(value.contiguous(memory_format=layout))
    return parameters


def optimizer_for(name: str, parameters: dict[str, nn.Parameter]) -> Any:
    settings = {"learning_rate": 0.01, **CLASSES[name]}
    pytest.importorskip(settings.get("optimizer", "torch").partition(":")[0])
    if name == "Muon of torch" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return make_optimizer(OptimizerConfig(**settings), parameters, CPU)


def train(optimizer: Any, parameters: dict[str, nn.Parameter], steps: range) -> None:
    """Steps whose gradients follow from the parameters, so that every difference goes on."""
    for step in steps:
        set_rates(optimizer, 1 / (1 + step))
        for number, (name, parameter) in enumerate(parameters.items()):
            if "unused" not in name and not ("late" in name and step < STEPS // 2):
                goal = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number + 100 * step))
                parameter.grad = (parameter.detach() - goal) / (1 + number)
        optimizer.step()
        optimizer.zero_grad()


def save(optimizer: Any, parameters: dict[str, nn.Parameter], folder: Path) -> None:
    tensors, scalars = state_tensors(optimizer, parameters)
    write_safetensors(folder / "optimizer.safetensors", tensors)
    write_safetensors(folder / "model.safetensors", {key: value.data for key, value in parameters.items()})
    write_json(folder / "state.json", scalars)


def resume(optimizer: Any, parameters: dict[str, nn.Parameter], folder: Path) -> None:
    tensors = read_safetensors(folder / "optimizer.safetensors")
    load_state(optimizer, parameters, tensors, read_json(folder / "state.json"), "optimizer.safetensors")


def parameters_of(folder: Path, name: str) -> dict[str, nn.Parameter]:
    parameters = parameters_for(name)
    for key, value in read_safetensors(folder / "model.safetensors").items():
        parameters[key].data.copy_(value)
    return parameters


def same(one: dict[str, nn.Parameter], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in parameters.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_broken_in_two_ends_where_the_unbroken_one_does(name: str, tmp_path: Path) -> None:
    unbroken = parameters_for(name)
    optimizer = optimizer_for(name, unbroken)
    train(optimizer, unbroken, range(STEPS // 2))
    save(optimizer, unbroken, tmp_path)
    before = copies(unbroken)
    with evaluating(optimizer):  # to look at the weights changes nothing
        assert same(unbroken, before) != name.startswith("schedule-free")
    assert same(unbroken, before)
    train(optimizer, unbroken, range(STEPS // 2, STEPS))

    broken = parameters_of(tmp_path, name)
    again = optimizer_for(name, broken)
    resume(again, broken, tmp_path)
    train(again, broken, range(STEPS // 2, STEPS))
    assert same(unbroken, broken)
    (mine, numbers), (theirs, others) = state_tensors(optimizer, unbroken), state_tensors(again, broken)
    assert numbers == others and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for key, value in mine.items():
        owner = key.partition(".")[2]
        if owner in unbroken and value.shape == unbroken[owner].shape:
            assert value.stride() == theirs[key].stride()

    forgetful = parameters_of(tmp_path, name)
    train(optimizer_for(name, forgetful), forgetful, range(STEPS // 2, STEPS))
    assert not same(unbroken, forgetful)


@pytest.fixture
def alone() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("alone")
def test_an_optimizer_that_accelerate_has_prepared_goes_on_too(tmp_path: Path) -> None:
    results = []
    for prepared in (False, True):
        parameters = parameters_for("Prodigy")
        optimizer = optimizer_for("Prodigy", parameters)
        for half in (range(STEPS // 2), range(STEPS // 2, STEPS)):
            if prepared:
                optimizer = Accelerator(cpu=True).prepare(optimizer_for("Prodigy", parameters)).optimizer
                if half.start:
                    resume(optimizer, parameters, tmp_path)
            train(optimizer, parameters, half)
            save(optimizer, parameters, tmp_path)
        results.append(parameters)
    assert same(*results)


@pytest.mark.usefixtures("alone")
def test_sharded_state_goes_on_from_whole_tensors(tmp_path: Path) -> None:
    rank: dict[str, Any] = {
        "backend": "gloo",
        "init_method": f"file://{tmp_path / 'store'}",
        "rank": 0,
        "world_size": 1,
    }
    torch.distributed.init_process_group(**rank)
    try:
        ends = []
        for broken in (False, True):
            torch.manual_seed(0)
            network = nn.Linear(6, 8)
            fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
            parameters = dict(network.named_parameters())
            assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
            optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01), parameters, torch.device("meta"))
            for step in range(4):
                if broken and step == 2:
                    tensors, scalars = state_tensors(optimizer, parameters)
                    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in tensors.items()}
                    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01), parameters, torch.device("meta"))
                    load_state(optimizer, parameters, whole, scalars, "optimizer.safetensors")
                network(torch.ones(2, 6) * step).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append([parameter.full_tensor() for parameter in parameters.values()])  # type: ignore[attr-defined]
        assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_within_evaluating_a_schedule_free_optimizer_shows_its_average() -> None:
    name = "schedule-free SGD"
    parameters = parameters_for(name)
    optimizer = optimizer_for(name, parameters)
    train(optimizer, parameters, range(3))
    tensors, scalars = state_tensors(optimizer, parameters)
    assert scalars["train_mode.group.0"] is True and averages_itself(optimizer)
    trained = copies(parameters)
    with pytest.raises(KeyError), evaluating(optimizer):
        for key, shown in parameters.items():
            if f"z.{key}" in tensors:  # y = (1 - beta) z + beta x, with beta 0.9
                torch.testing.assert_close(shown.detach(), (trained[key] - 0.1 * tensors[f"z.{key}"]) / 0.9)
        raise KeyError
    assert same(parameters, trained)
    assert not averages_itself(torch.optim.AdamW(parameters.values()))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("exp_avg_sq.unet.conv_in.weight", None, "of unet.conv_in.weight it holds count exp_avg step, which is not"),
        ("exp_avg.unet.other.weight", torch.ones(2), "exp_avg.unet.other.weight is not part of this run's optimizer"),
        ("k.group.0", None, "state for 8 parameters and groups is there, not for all"),
        ("k.group.7", 3, "k.group.7 is not part of this run's optimizer"),
        ("params.group.0", 3, "params.group.0 is not part of this run's optimizer"),
        ("lr.group.0", 3.0, "lr.group.0 is not part of this run's optimizer"),
        ("k.group.0", [3], "k.group.0 is a list, where a number was expected"),
        ("layout", 3, "is not the whole of its state"),
    ],
)
def test_state_that_is_not_whole_changes_nothing(entry: str, value: Any, message: str) -> None:
    parameters = parameters_for("AdamW")
    optimizer = optimizer_for("AdamW", parameters)
    train(optimizer, parameters, range(2))
    optimizer.param_groups[0]["k"] = 4
    optimizer.state[parameters["unet.conv_in.weight"]]["count"] = 2
    given = state_tensors(optimizer, parameters)
    before = {key: tensor.clone() for key, tensor in given[0].items()}
    broken: list[dict[str, Any]] = [dict(part) for part in given]
    for part in broken:
        part.pop(entry, None)
    if value is not None:
        broken[0 if isinstance(value, Tensor) else 1][entry] = value
    with pytest.raises(InputError, match=r"^checkpoint-7: ") as caught:
        load_state(optimizer, parameters, broken[0], broken[1], "checkpoint-7")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    tensors, scalars = state_tensors(optimizer, parameters)
    assert scalars == given[1] and tensors.keys() == before.keys()
    assert all(torch.equal(tensors[key], before[key]) for key in before)
    load_state(optimizer, parameters, *given, "checkpoint-7")


def test_the_state_of_a_parameter_that_is_missing_altogether_is_missed() -> None:
    parameters = parameters_for("AdamW")
    optimizer = optimizer_for("AdamW", parameters)
    train(optimizer, parameters, range(2))
    tensors, scalars = state_tensors(optimizer, parameters)
    rest = {key: tensor for key, tensor in tensors.items() if "conv_in" not in key}
    with pytest.raises(InputError, match="not for all of them"):
        load_state(optimizer, parameters, rest, scalars, "checkpoint-7")


def test_a_class_that_keeps_what_no_file_holds_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.LBFGS([parameter])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(InputError, match=r"optimizer.optimizer: torch.optim.lbfgs:LBFGS keeps al of weight, a list"):
        state_tensors(optimizer, {"weight": parameter})
    with pytest.raises(InputError, match="state that belongs to no parameter"):
        state_tensors(optimizer, {})


def groups(**settings: Any) -> list[tuple[float, list[str]]]:
    parameters = parameters_for("AdamW")
    names = {id(parameter): name for name, parameter in parameters.items()}
    optimizer = make_optimizer(OptimizerConfig(**settings), parameters, CPU)
    assert all(group["lr"] == group["peak"] for group in optimizer.param_groups)
    set_rates(optimizer, 0.25)
    assert all(group["lr"] == group["peak"] * 0.25 for group in optimizer.param_groups)
    return [(group["peak"], [names[id(p)] for p in group["params"]]) for group in optimizer.param_groups]


def test_a_parameter_is_of_the_group_of_the_first_expression_then_text_then_muon_then_the_rest() -> None:
    chosen = {r"conv1\.weight$": 3.0, "conv1|fc1": 4}
    found = groups(learning_rate=1.0, text_encoder_lr=2.0, muon_lr=5.0, group_lr=chosen)
    assert found == [
        (1.0, ["unet.conv_in.weight", "unet.scale"]),
        (2.0, ["text.unused.weight"]),
        (
            5.0,
            [
                "unet.mid_block.attentions.0.to_q.weight",
                "unet.mid_block.resnets.0.conv_shortcut.weight",
                "unet.zero.weight",
                "unet.late.weight",
            ],
        ),
        (3.0, ["unet.mid_block.resnets.0.conv1.weight"]),
        (4, ["text.model.fc1.weight", "unet.mid_block.resnets.0.conv1.bias"]),
    ]
    assert groups(learning_rate=1.0, group_lr={".": 0.5}) == [(0.5, list(SHAPES))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_lr": {"conv(": 1.0}}, "optimizer.group_lr: 'conv(' is no regular expression"),
        ({"group_lr": {"conv9": 1.0}}, "optimizer.group_lr: 'conv9' is found in no parameter"),
        ({"group_lr": {"conv": 1.0, "conv1": 2.0}}, "optimizer.group_lr: 'conv1' is found in no parameter"),
        ({"optimizer": "torch.optim:SGD", "optimizer_args": {"momentun": 1}}, "unexpected keyword argument 'momentun'"),
        ({"optimizer": "torch.optim:SGD", "optimizer_args": {"momentum": -1}}, "Invalid momentum value: -1"),
        ({"optimizer": "torch.optim:SGD", "optimizer_args": {"lr": 1}}, "lr is not for here"),
        ({"optimizer": "transformers.optimization:Adafactor"}, "Cannot combine manual `lr` and `relative_step=True`"),
        ({"optimizer": "torch.optim:lr_scheduler"}, "optimizer.optimizer: torch.optim:lr_scheduler is not a class"),
        ({"optimizer": "torch.optim:Adamm"}, "optimizer.optimizer: torch.optim has no Adamm"),
    ],
)
def test_what_makes_no_optimizer_is_one_line_that_names_the_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_optimizer(OptimizerConfig(**settings), parameters_for("AdamW"), CPU)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert text.startswith("optimizer.optimizer_args: ") or message.startswith("optimizer.")


@pytest.mark.parametrize("processes", [1, 8])
def test_the_rate_follows_the_images_seen_on_any_number_of_processes(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = Config(
        optimizer=OptimizerConfig(lr_scheduler="cosine", lr_warmup_steps=4),
        train=TrainConfig(max_train_steps=20, train_batch_size=16, gradient_accumulation_steps=2),
    )
    course = rate_course(config)
    for images in range(0, 321, 16):
        step = images // 16
        expected = step / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        assert course(step) == pytest.approx(expected, abs=1e-12)
