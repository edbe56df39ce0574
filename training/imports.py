"""Code of the user's own, named in the settings."""

import importlib
from functools import reduce
from typing import Any

from diffusion_unet.arguments import suggest
from diffusion_unet.errors import InputError


def load_object(path: str, key: str) -> Any:
    """What "package.module:name" names; the name may be dotted, as in "module:Class.method".

    The module is imported, which runs it: `path` comes from the user's own settings only, never from a model or data
    file. `key` is the setting that holds it. Raises InputError, in one line, for a path of another form, and for a
    module or a name that is not there."""
    module_name, _, name = path.partition(":")
    parts = [*module_name.split("."), *name.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise InputError(f"{key}: {path!r} is not of the form package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise InputError(
                f"{key}: there is no module {error.name}; install it, or put its folder on PYTHONPATH"
            ) from None
        raise InputError(f"{key}: {module_name} needs the module {error.name}, which is not installed") from error
    except ImportError as error:
        raise InputError(f"{key}: {module_name} cannot be imported: {' '.join(str(error).split())}") from error
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError:
        raise InputError(f"{key}: {module_name} has no {name}{suggest(name, dir(module))}") from None
