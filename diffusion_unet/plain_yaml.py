"""YAML as people mean it, for every settings file of this project: 1e-4 is a number, `no` is a word."""

import re
from collections import Counter
from typing import Any, ClassVar

import yaml

from .errors import InputError


class _Loader(yaml.SafeLoader):
    """Without YAML 1.1's yes, no, on and off; a key given twice is an error."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return mapping


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str, source: str) -> Any:
    """What the text holds, plain values only. Raises InputError, which `source` begins, for what is not valid."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a SafeLoader
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{source}{place}: not valid YAML: {error.problem}") from None
    # The last four are what yaml's own constructors raise on a tag such as `!!int` before another kind of value.
    except (yaml.YAMLError, RecursionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{source}: not valid YAML: {str(error).partition(chr(10))[0]}") from None
