"""What a person is told in one line, and the exit code of the command line that goes with it."""


class Failure(Exception):
    """The base of every error that is meant for a person: its text is one line that names the thing and the remedy."""

    exit_code = 1
    told = False  # by another process, so that it is not told again


class InputError(Failure, ValueError):
    """A file, a configuration, a size or a value that cannot be worked with."""

    exit_code = 2


class NonFiniteError(Failure, ArithmeticError):
    """A loss or a gradient is NaN or infinite; raised before any weight is touched."""

    exit_code = 3


class SaveError(Failure, OSError):
    """A file could not be written; what had been written before is untouched."""

    exit_code = 4


class Stopped(Failure):
    """The run was told to stop (SIGTERM, Ctrl-C), or its stream broke off, and it has saved its state."""

    exit_code = 75


def in_bytes(count: int) -> str:
    """A size for a person and for a program: "900 bytes", "4123456789 bytes (3.8 GiB)"."""
    return f"{count} bytes" if count < 1024 else f"{count} bytes ({in_units(count)})"


def in_units(count: int) -> str:
    """A size to one decimal: "900 bytes", "3.8 GiB"."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
