"""Files of prompts, for what draws them and for what scores them: .txt, or .jsonl with settings beside each prompt."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .arguments import MAX_SEED
from .errors import InputError
from .untrusted import Field, checked, parse_object, read_bytes, shorten

MAX_BYTES = 32 << 20
MAX_PROMPTS = 100_000  # pictures are numbered in five digits

DRAWN = {"negative_prompt": Field(str), "seed": Field(int, 0, MAX_SEED)}  # what a picture may have of its own
SCORED = {"label": Field(int, 0, 1e9)}  # the class that a picture is to be of


def read_prompts(path: Path, fields: Mapping[str, Field]) -> list[dict[str, Any]]:
    """The prompts of a UTF-8 file, in order, each {"prompt": text} with those of `fields` that it gives.

    .txt: a prompt a line; empty lines, and those that begin with #, are left out. .jsonl: an object a line, of "prompt"
    and any of `fields`; null is as if left out. Raises InputError, one line that names the file and the line."""
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise InputError(f"{path}: prompts are read from a .txt file, one a line, or a .jsonl file, an object a line")
    found: list[dict[str, Any]] = []
    for number, line in _lines(path):
        name = f"{path}, line {number}"
        if kind == ".jsonl":
            row = _row(line, name, {"prompt": Field(str), **fields})
        elif line.startswith("#"):
            continue
        else:
            row = {"prompt": line}
        if any("\0" in value for value in row.values() if isinstance(value, str)):
            raise InputError(f"{name}: holds a NUL character, which is in no text: take it out")
        if len(found) == MAX_PROMPTS:
            raise InputError(f"{name}: over {MAX_PROMPTS} prompts: cut the file in two")
        found.append(row)
    if not found:
        raise InputError(f"{path}: holds no prompt")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers. Raises InputError."""
    data = read_bytes(path, MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = 1 + data.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {where}: is not UTF-8; save the file in this encoding") from None
    # Not splitlines(), which also cuts where a text may hold U+2028 and the like.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.removesuffix("\n")


def _row(line: str, name: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    row = parse_object(line.encode(), name)
    if unknown := row.keys() - fields.keys():
        raise InputError(f"{name}: {shorten(min(unknown))} is not known here: {', '.join(fields)} are")
    values = checked(row, fields, name)
    if "prompt" not in values:
        raise InputError(f'{name}: has no "prompt"')
    return values
