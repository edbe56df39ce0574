"""Runs of the command line that begin at once: forks of a process that has imported torch already.

    with Forks() as forks:
        run = forks.start(["train", "config.yaml"], log=Path("log"))
        run.kill()
        run.wait()

A fork runs the module `diffusion_unet` as `python -m diffusion_unet` does, in a process group of its own; what it
spares are the seconds in which a new interpreter reads torch, and those in which an old one is taken apart.
`start_process` starts a whole one instead. Both can be killed as hard as any process: they share nothing with the one
that started them but pages that nobody writes.
"""

import ctypes
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusion_unet.cli",
    "sampling",
    "sampling.sampler",
    "tokenizers",
    "training.exporting",
    "training.loop",
    "transformers.models.clip.modeling_clip",
)
PR_SET_PTRACER = 0x59616D61
ANY_PROCESS = ctypes.c_ulong(-1)


def environment(**more: str) -> dict[str, str]:
    """What runs are given: the project, one thread, no network, a progress bar that does not write at will."""
    found = f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else str(ROOT)
    settled = {
        "PYTHONPATH": found,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_MININTERVAL": "3600",
    }
    return {**os.environ, **settled, **more}


class Running:
    """A process that leads its own group. `code` is as subprocess has it: negative for a signal."""

    def __init__(self, pid: int, log: Path):
        self.pid, self.log, self.code = pid, log, None
        self._descriptor = os.pidfd_open(pid)
        self.begun = time.monotonic()

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code. One that goes on for longer is killed: TimeoutError."""
        if not self.ended(seconds):
            self.kill_family()
            raise TimeoutError(f"process {self.pid} was still there after {seconds} s: {self.text()[-2000:]}")
        return self._collect()

    def ended(self, seconds: float) -> bool:
        """Whether it has ended, after at most so many seconds."""
        return self.code is not None or bool(select.select([self._descriptor], [], [], max(seconds, 0.0))[0])

    def kill(self) -> list[int]:
        """kill -9 of the whole group, and the end of it. Returns its descendants of that moment, other groups' too."""
        others = descendants(self.pid)
        self.signal(signal.SIGKILL, group=True)
        select.select([self._descriptor], [], [])
        self._collect()
        return others

    def kill_family(self) -> None:
        """As `kill`, and all descendants: launchers put theirs into sessions of their own."""
        for pid in self.kill():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal, unless it has ended."""
        if self.code is None:
            (os.killpg if group else os.kill)(self.pid, number)

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def errors(self) -> list[str]:
        """The lines that begin with error."""
        return [line for line in self.text().splitlines() if line.startswith("error")]

    def _reap(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _collect(self) -> int:
        if self.code is None:
            self.code = self._reap()
            os.close(self._descriptor)
        return self.code


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found


def alive(pids: Sequence[int], seconds: float) -> list[int]:
    """Which of these processes are still there after so many seconds; returns as soon as there is none."""
    until = time.monotonic() + seconds
    while there := [pid for pid in pids if _runs(pid)]:
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return there


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_process(
    command: Sequence[str], log: Path, *, folder: Path | None = None, add: Mapping[str, str] | None = None
) -> Running:
    """A new interpreter with these arguments, or whatever program they begin with."""
    line = list(command) if Path(command[0]).is_absolute() else [sys.executable, *command]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            line,
            env=environment(**(add or {})),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    process.returncode = 0  # it is waited for here
    return Running(process.pid, log)


def torchrun(count: int, *arguments: str) -> list[str]:
    """The command line of so many processes on this machine."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *arguments]


class Forked(Running):
    def __init__(self, forks: "Forks", pid: int, log: Path, gate: int | None):
        super().__init__(pid, log)
        self._forks, self._gate = forks, gate

    def go(self) -> None:
        """Lets it through the gate at which it waits."""
        assert self._gate is not None
        os.write(self._gate, b"x")
        os.close(self._gate)

    def _reap(self) -> int:
        return int(self._forks.ask({"reap": self.pid}))


class Forks:
    """The process that others are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.ask(None)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def ask(self, request: Any) -> Any:
        stream, answers = self._process.stdin, self._process.stdout
        assert stream is not None and answers is not None
        print(json.dumps(request), file=stream, flush=True)
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"the process to fork from has ended ({self._process.wait()})")
        return json.loads(answer)

    def start(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        module: str = "diffusion_unet",
        folder: Path | None = None,
        add: Mapping[str, str] | None = None,
        gate: bool = False,
    ) -> Forked:
        """Runs a module, with stdout and stderr appended to `log`. gate: it waits for `go` before its first line."""
        named = log.with_suffix(".gate")
        if gate:
            named.unlink(missing_ok=True)
            os.mkfifo(named)
        pid = self.ask(
            {
                "module": module,
                "arguments": [str(argument) for argument in arguments],
                "log": str(log),
                "folder": str(folder or Path.cwd()),
                "environment": dict(add or {}),
                "gate": str(named) if gate else None,
            }
        )
        opened = os.open(named, os.O_WRONLY) if gate else None  # waits for the other end
        named.unlink(missing_ok=True)
        return Forked(self, pid, log, opened)


def serve() -> dict[str, Any] | None:
    """Forks as it is asked to. Returns in each fork what that is to do, and None at the end of the questions."""
    for name in PRELOADED:
        __import__(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:  # of which a fork would have one, and the locks of all
        raise RuntimeError(f"{threads} threads after the imports")
    gc.freeze()  # forks share the pages of what is there, and do not look through it
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            answer = None
        elif "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                os.setpgid(0, 0)
                return dict(request)
            os.setpgid(answer, answer)  # whoever is first: it may be killed at once
        print(json.dumps(answer), flush=True)
    return None


def become(request: Mapping[str, Any]) -> None:
    """In a fork: the program that was asked for."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, log, log)):
        os.dup2(descriptor, number)
    os.close(log)
    os.close(nothing)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["gate"]:
        # Where only parents may trace their children, this lets any process of the same user.
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY_PROCESS, 0, 0, 0)
        with open(request["gate"], "rb", buffering=0) as gate:
            gate.read(1)
    sys.path[0] = request["folder"]
    sys.argv = [request["module"], *request["arguments"]]
    code: Any = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    if (what := serve()) is not None:
        become(what)
