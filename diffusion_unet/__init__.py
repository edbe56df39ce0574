"""A Stable-Diffusion-style U-Net: its network, its mathematics and its files.

Names are found when first used (PEP 562), so that `import diffusion_unet` does not import torch. `sample` and `train`
live in the sibling packages `sampling` and `training`, which are taken from beside this package whatever else bears
their names.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sampling import sample
    from training import train

    from .config import UNetConfig
    from .denoiser import Denoiser
    from .errors import Failure, InputError, NonFiniteError, SaveError, Stopped
    from .model import DiffusionModel
    from .pipeline import PixelTextToImagePipeline
    from .schedule import NoiseSchedule
    from .unet import UNet
    from .unet_2d_condition import UNet2DConditionModel

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "DiffusionModel",
    "Failure",
    "InputError",
    "NoiseSchedule",
    "NonFiniteError",
    "PixelTextToImagePipeline",
    "SaveError",
    "Stopped",
    "UNet",
    "UNet2DConditionModel",
    "UNetConfig",
    "sample",
    "train",
]

_MODULES = {
    "Denoiser": "denoiser",
    "DiffusionModel": "model",
    "Failure": "errors",
    "InputError": "errors",
    "NoiseSchedule": "schedule",
    "NonFiniteError": "errors",
    "PixelTextToImagePipeline": "pipeline",
    "SaveError": "errors",
    "Stopped": "errors",
    "UNet": "unet",
    "UNet2DConditionModel": "unet_2d_condition",
    "UNetConfig": "config",
}
_SIBLINGS = {"sample": "sampling", "train": "training"}


def sibling(name: str) -> ModuleType:
    """The package `name` ("training" or "sampling") that was installed beside this one.

    It is found by its place, not along `sys.path`, so that a folder of that name where a program runs does not hide it.
    Once found it is in `sys.modules`: `from training.config import ...` then reads ours too.

    Raises ImportError when another package of that name has been imported already.
    """
    folder = Path(__file__).resolve().parent.parent / name
    loaded = sys.modules.get(name)
    if loaded is not None:
        places = [str(Path(place).resolve()) for place in getattr(loaded, "__path__", [])]
        if places != [str(folder)]:
            place = ", ".join(places) or getattr(loaded, "__file__", None) or "an unknown place"
            raise ImportError(
                f"another {name!r} is already imported, from {place}: rename that one, or import it later"
            )
        return loaded
    file = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"{folder} is not a package: reinstall diffusion-unet")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    elif name in _SIBLINGS:
        value = getattr(sibling(_SIBLINGS[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
