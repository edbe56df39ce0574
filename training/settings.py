"""Reading settings into frozen dataclasses: strictly typed, and every fault is one line that names the key.

A field made by `setting` carries its explanation, its bounds, and whether a run may be
resumed with another value. Types are int, float, bool, str, Literal of texts, dict[str, Any], tuple[str, ...], another
dataclass (a section), or one of them or None.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any, Literal, NamedTuple

from diffusion_unet.arguments import nearest
from diffusion_unet.errors import InputError
from diffusion_unet.plain_yaml import parse as parse

REQUIRED = object()


def explain(
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    fixed: bool = True,
    required: bool = False,
    empty: bool = False,
) -> dict[str, Any]:
    """The metadata of a field. `low` and `high` are inclusive bounds of a number, `above` is exclusive; `fixed` says
    that a run cannot be resumed with another value, `empty` that a text may be empty."""
    bounds = {"low": low, "above": above, "high": high}
    return {"help": help, **bounds, "fixed": fixed, "required": required, "empty": empty}


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field with an immutable default, or REQUIRED, and its explanation; `more` as for `explain`."""
    required = default is REQUIRED
    return field(default=None if required else default, metadata=explain(help, required=required, **more))


class Setting(NamedTuple):
    key: str  # dotted
    type: str  # in words; empty for a section
    default: str  # as YAML, or "required"
    help: str
    fixed: bool  # a run cannot be resumed with another value


def leaves(kind: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting of the dataclass, sections before their settings, in order."""
    for spec in dataclasses.fields(kind):
        key, section, meta = prefix + spec.name, _section(spec.type), spec.metadata
        if section:
            yield Setting(key, "", "", meta["help"], meta["fixed"])
            yield from leaves(section, key + ".")
        else:
            default = "required" if meta["required"] else show(spec.default)
            yield Setting(key, _name(spec.type), default, meta["help"], meta["fixed"])


def apply(kind: Any, tree: dict[str, Any], override: str) -> None:
    """Writes one `--section.key=value` into the tree of settings of the dataclass `kind`. Raises InputError."""
    key, equals, text = override.removeprefix("--").partition("=")
    names = key.split(".")
    if not (override.startswith("--") and equals and all(names)):
        raise InputError(f"{override}: expected --section.key=value")
    for depth, name in enumerate(names[:-1]):
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise InputError(f"{override}: {'.'.join(names[: depth + 1])} is not a section")
    # A path or a prompt is text, whatever YAML would make of it.
    is_text = text != "null" and str in _choices(_find(kind, names))
    tree[names[-1]] = text if is_text else parse(text, override)


def build(kind: Any, tree: Any, source: str, overrides: Sequence[str] = (), prefix: str = "", root: Any = None) -> Any:
    """A dataclass `kind` from a tree of mappings, to which `overrides` have been applied. Raises InputError, which
    begins with the override that gave what is wrong, or else with `source` (a file)."""
    root = root or kind
    fields = {spec.name: spec for spec in dataclasses.fields(kind)}
    if not isinstance(tree, dict):
        expected = f"a section with {', '.join(fields)}"
        raise InputError(f"{_given_by(source, overrides, prefix.rstrip('.'))}: expected {expected}, got {show(tree)}")
    unknown = next((str(name) for name in tree if name not in fields), None)
    if unknown is not None:
        place = _given_by(source, overrides, prefix + unknown)
        raise InputError(f"{place} is not a setting; {_nearest(root, prefix, unknown)}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        section, given = _section(spec.type), tree.get(name)
        if (
            given is None
            and types.NoneType in _choices(spec.type)
            and (name in tree or (section and spec.default is None))
        ):
            values[name] = None
        elif section:
            values[name] = build(section, {} if given is None else given, source, overrides, f"{prefix}{name}.", root)
        elif name in tree:
            values[name] = _convert(given, spec, _given_by(source, overrides, prefix + name))
        elif spec.metadata["required"]:
            raise InputError(f"{source}: {prefix}{name} is missing: {spec.metadata['help']}")
    return kind(**values)


def _given_by(source: str, overrides: Sequence[str], key: str) -> str:
    """What begins a message about a setting: the last override of it, its section or a part of it; or the file."""
    for override in reversed(overrides):
        given = override.removeprefix("--").partition("=")[0]
        if given == key:
            return f"--{key}"
        if key.startswith(f"{given}.") or given.startswith(f"{key}."):
            return f"--{given}: {key}"
    return f"{source}: {key}"


def _convert(value: Any, spec: "dataclasses.Field[Any]", key: str) -> Any:
    hint: Any = spec.type
    low, above, high = (spec.metadata[name] for name in ("low", "above", "high"))
    for choice in _choices(hint):
        if choice in (int, float) and _is_number(value, choice):
            if (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high):
                return choice(value)
        elif choice is str and value == "" and not spec.metadata["empty"]:
            raise InputError(f"{key}: is empty; give a text, or leave it out")
        elif _accepts(choice, value):
            return tuple(map(str, value)) if isinstance(value, list) else value
    bounds = {"at least": low, "more than": above, "at most": high}
    limits = " and ".join(
        f"{words} {bound if isinstance(bound, int) else format(bound, 'g')}"
        for words, bound in bounds.items()
        if bound is not None
    )
    raise InputError(f"{key}: expected {' '.join([_name(hint), limits]).strip()}, got {show(value)}")


def _is_number(value: Any, kind: type) -> bool:
    return (
        isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )


def _accepts(choice: Any, value: Any) -> bool:
    origin = typing.get_origin(choice)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(choice)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if origin is tuple:
        # A number in a list of texts is meant as it is written: [0.9999], or a prompt of digits.
        return isinstance(value, list) and all(type(item) in (str, int, float) for item in value)
    return choice in (bool, str) and isinstance(value, choice)


def _nearest(root: Any, prefix: str, name: str) -> str:
    known = [item.key for item in leaves(root)]
    here = {key.removeprefix(prefix): key for key in known if key.startswith(prefix)}
    anywhere = {key.rpartition(".")[2]: key for key in known}
    near = anywhere.get(name) or _closest(name, here) or _closest(name, anywhere)
    return f"the nearest is {near}" if near else f"there are {', '.join(here)}"


def _closest(name: str, keys: dict[str, str]) -> str | None:
    near = nearest(name, keys)
    return None if near is None else keys[near]


def _choices(hint: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def _section(hint: Any) -> Any:
    return next((choice for choice in _choices(hint) if dataclasses.is_dataclass(choice)), None)


def _find(kind: Any, names: list[str]) -> Any:
    """The type of the setting with these names, None when there is none (or it lies inside a free mapping)."""
    hint: Any = kind
    for name in names:
        section = _section(hint)
        hint = next((spec.type for spec in dataclasses.fields(section) if spec.name == name), None) if section else None
    return hint


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    origins = {dict: "a mapping", tuple: "a list of texts"}
    parts = []
    for choice in _choices(hint):
        if typing.get_origin(choice) is Literal:
            parts.append("one of " + ", ".join(typing.get_args(choice)))
        else:
            parts.append(names.get(choice) or origins[typing.get_origin(choice)])
    return " or ".join(parts)


def show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
