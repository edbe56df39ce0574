"""From a folder of captioned images to a model folder.

`train` and `export` are found when first used, so that the settings can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporting import export
    from .loop import train

__all__ = ["export", "train"]

_MODULES = {"export": "exporting", "train": "loop"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
