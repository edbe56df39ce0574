"""strace around a fork: what system calls it makes, and what happens when one of them fails or is the last."""

import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from forks import Forked

STRACE = shutil.which("strace")
MARK = "/what-is-traced-begins-here"  # a file that is not there, and is looked for
FILES = "%file,%desc"  # all calls that take a path or a descriptor
CHANGES = {
    "chmod", "copy_file_range", "creat", "fallocate", "fchmod", "fdatasync", "fsync", "ftruncate", "link", "linkat",
    "mkdir", "mkdirat", "open", "openat", "pwrite64", "pwritev", "rename", "renameat", "renameat2", "rmdir", "sendfile",
    "symlink", "symlinkat", "sync_file_range", "truncate", "unlink", "unlinkat", "write", "writev",
}  # fmt: skip
_LINE = re.compile(r"(?:(\d+) +)?(\w+)\((.*)")
_PATHS = re.compile(r'"((?:[^"\\]|\\.)*)"|\d+<(/[^>]*)>')


@dataclass(frozen=True)
class Call:
    """A system call: the number-th of its name that its thread made. `text`: its arguments and what it returned."""

    thread: str | None
    name: str
    number: int
    text: str

    @property
    def paths(self) -> list[str]:
        """The files that it names, by path or by descriptor."""
        found = _PATHS.findall(self.text)
        writes = self.name in ("write", "writev", "pwrite64", "read", "pread64")  # what is in quotes is data
        return [other for _, other in found if other] if writes else [one or other for one, other in found]

    @property
    def failed(self) -> bool:
        return " = -1 " in self.text

    @property
    def changes(self) -> bool:
        """Whether it changes something on the disk, or might."""
        reads = self.name in ("open", "openat") and "O_RDONLY" in self.text and "O_CREAT" not in self.text
        return self.name in CHANGES and not reads

    def below(self, folder: Path) -> bool:
        """Whether it changes something in a folder, or might."""
        return self.changes and any(Path(path).is_relative_to(folder) for path in self.paths)

    @property
    def kill(self) -> str:
        """strace's option to kill the process as it enters this call."""
        return f"{self.name}:signal=KILL:when={self.number}"

    def fail(self, error: str) -> str:
        """strace's option to have this call fail."""
        return f"{self.name}:error={error}:when={self.number}"

    def __str__(self) -> str:
        return f"{self.name}({self.text}"


class Trace:
    """strace on a fork that waits at its gate, which it then passes.

    inject: as strace's option, or None. family: with all threads and children; otherwise the main thread alone, which
    is the one that writes. Calls are counted, by strace too, for each thread on its own."""

    def __init__(
        self, process: Forked, out: Path, inject: str | None = None, *, calls: str = FILES, family: bool = False
    ):
        self.out = out
        out.unlink(missing_ok=True)
        options = [f"--trace={calls}", *([f"--inject={inject}"] if inject else [])]
        line = [
            str(STRACE),
            *(["-f"] if family else []),
            "-y",
            "-qq",
            "-s",
            "200",
            "-o",
            str(out),
            *options,
            "-p",
            str(process.pid),
        ]
        self._strace = subprocess.Popen(line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while "TracerPid:\t0\n" in Path(f"/proc/{process.pid}/status").read_text():
            if self._strace.poll() is not None:
                process.kill()
                raise OSError(f"strace: {self._strace.communicate()[1].strip()}")
            time.sleep(0.001)
        process.go()

    def end(self) -> list[Call]:
        """What was called, once the process has ended."""
        self._strace.communicate()
        return read(self.out)


def read(path: Path) -> list[Call]:
    """The calls that strace has written down, in the order in which they began."""
    counts: Counter[tuple[str | None, str]] = Counter()
    calls = []
    for line in path.read_text(errors="replace").splitlines():
        if (match := _LINE.match(line)) is not None:
            thread, name, text = match.groups()
            counts[thread, name] += 1
            calls.append(Call(thread, name, counts[thread, name], text))
    return calls


def refused() -> str | None:
    """Why nothing can be traced here, None where it can."""
    if STRACE is None:
        return "strace is not installed"
    tried = subprocess.run([STRACE, "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"strace: {tried.stderr.strip()}" if tried.returncode else None
