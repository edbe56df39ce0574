"""The words of a command line: a parser whose errors are one line, and the types of its values."""

import argparse
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from .errors import InputError
from .solver_names import solver_named

MAX_SEED = 2**64 - 1
MAX_SEEDS = 100_000
MAX_STEPS, MAX_SIDE = 10_000, 16_384  # those of `sampling`


class Parser(argparse.ArgumentParser):
    """argparse whose every error is one InputError, and that knows the nearest right option."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        self.known: list[str] = []
        super().__init__(
            prog, None, description, epilog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.known += action.option_strings
        return action

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--section.key=value` and `--section.key value` out; returns the rest, and those with an equals sign."""
    rest: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, _ = word.partition("=")
        if not key.startswith("--") or "." not in key:
            rest.append(word)
        elif equals:
            overrides.append(word)
        else:
            value = next(words, None)
            if value is None:
                raise InputError(f"{key}: a value is missing: {key}=VALUE")
            overrides.append(f"{key}={value}")
    return rest, overrides


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`; None when none is similar."""
    return next(iter(get_close_matches(name, names, n=1)), None)


def suggest(name: str, names: Iterable[str]) -> str:
    """ ": did you mean NAME?" with the nearest of `names`; nothing when there is none."""
    near = nearest(name, names)
    return f": did you mean {near}?" if near else ""


def seeds(text: str) -> list[int]:
    """A list of seeds such as 0-7, 0,3 or 0-3,8; each 0 to 2**64 - 1, none twice."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_SEED or last - first >= MAX_SEEDS:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds such as 0-7 or 0,3 (0 to 2**64 - 1)")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return found


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels, each 1 to 16,384, as (height, width)."""
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not match or not all(1 <= int(side) <= MAX_SIDE for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is no WIDTHxHEIGHT in pixels such as 512x768 (at most {MAX_SIDE})")
    return int(match[2]), int(match[1])


def interval(text: str) -> tuple[float | None, float | None]:
    """LOW:HIGH, two noise levels of at least 0, the lower first; either may be left out, and then is None."""
    low, colon, high = text.partition(":")
    sides = finite(low) if low else None, finite(high) if high else None
    if not colon or not 0 <= (sides[0] or 0) < (math.inf if sides[1] is None else sides[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no LOW:HIGH of noise levels such as 0.28:5.42, :5.42 or 0.28:")
    return sides


def numbers(text: str) -> list[float]:
    """Numbers with commas between them."""
    return [finite(part) for part in text.split(",")]


def solver(text: str) -> str:
    """A name of a solver, as it is given."""
    try:
        solver_named(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def one_seed(text: str) -> int:
    """A whole number, 0 to 2**64 - 1."""
    first, *more = seeds(text)
    if more:
        raise argparse.ArgumentTypeError(f"{text!r} names several seeds")
    return first


def whole(text: str) -> int:
    """A whole number, 1 to 999,999,999."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def steps(text: str) -> int:
    """A whole number, 1 to 10,000."""
    number = whole(text)
    if number > MAX_STEPS:
        raise argparse.ArgumentTypeError(f"{text!r} is too many: at most {MAX_STEPS}")
    return number


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return number


def command() -> str:
    """How this program is called again from here: by its name where a shell finds it, else by its path."""
    script = Path(sys.executable).with_name("diffusion-unet")
    found = shutil.which("diffusion-unet")
    if found and Path(found).resolve() == script.resolve():
        return "diffusion-unet"
    if script.exists():
        return shlex.quote(os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script))
    return f"{shlex.quote(sys.executable)} -m diffusion_unet"


def nobody_reads() -> bool:
    """Whether stdout was closed at its other end (`... | head`). What is left to print then goes nowhere."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def quote(path: Path) -> str:
    """As a shell reads it."""
    return shlex.quote(str(path))


def tell(message: str, exit_code: int) -> int:
    """Prints an error as one line on stderr, and returns the exit code."""
    print("error: " + plain(" ".join(message.split("\n"))), file=sys.stderr, flush=True)
    return exit_code


def plain(line: str) -> str:
    """What stands in a name or a file that came from elsewhere does not get to steer the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
