"""configs/accelerate: accelerate's own class reads each, and its launcher makes of it what the file promises."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from diffusion_unet.attention import Transformer2DModel
from diffusion_unet.layers import ResnetBlock2D
from training import engine

FOLDER = Path(__file__).resolve().parent.parent / "configs/accelerate"
# kind, machines, processes on all of them
PROMISED = {
    "8-gpus.yaml": (DistributedType.MULTI_GPU, 1, 8),
    "nodes.yaml": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp2.yaml": (DistributedType.FSDP, 1, 8),
}


def environment(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` tells the processes."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    command = ["--config_file", str(FOLDER / name), "-m", "diffusion_unet", "train", "config.yaml"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    made: dict[str, str] = prepare_multi_gpu_env(arguments)
    assert arguments.module and arguments.training_script == "diffusion_unet"
    assert int(arguments.nproc_per_node) == 8
    return made


def test_every_config_is_tested_here() -> None:
    assert {path.name for path in FOLDER.iterdir()} == PROMISED.keys()


@pytest.mark.parametrize("name", PROMISED)
def test_it_says_what_it_promises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterConfig.from_yaml_file(str(FOLDER / name))
    assert (config.distributed_type, config.num_machines, config.num_processes) == PROMISED[name]
    assert config.mixed_precision == "bf16" and not config.use_cpu
    made = environment(name, monkeypatch)
    assert made["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert ("ACCELERATE_USE_FSDP" in made) == (name == "fsdp2.yaml")
    for variable in engine.NOT_SUPPORTED:
        assert variable not in made


def test_the_sharding_is_one_that_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    known = {action.dest for action in launch_command_parser()._actions}
    assert settings.keys() <= known
    for variable, value in environment("fsdp2.yaml", monkeypatch).items():
        monkeypatch.setenv(variable, value)
    plugin = engine._sharding()
    assert plugin is not None and plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == [ResnetBlock2D.__name__, Transformer2DModel.__name__]
