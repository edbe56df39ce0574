"""Where one of several processes dies, freezes or fails, the others end soon and name it, and torchrun goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from tiny_run import assert_same, image_folder, tiny_config
from torch.distributed import TCPStore

from diffusion_unet.errors import InputError
from training import checkpoint, heartbeat
from training.heartbeat import Heartbeat, watched
from training.rendezvous import agree

TESTS = Path(__file__).parent
TIMEOUT = 3  # seconds, the setting
LIMIT = TIMEOUT + 5  # seconds from a fault until all processes have ended: of the default setting 15
# What happens the first, second, ... time that torchrun starts the run: to which rank, and where the run is by then.
FAULTS = ("KILL-1-step3", "STOP-1-preview", "KILL-0-preview", "STOP-0-step4")


# --- real processes --------------------------------------------------------------------------------------------------


def launch(folder: Path, *faults: str) -> tuple[int, str, float]:
    """Exit code and stderr of torchrun, which starts the processes anew for each fault but the last; when it ended."""
    alone = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(
        [sys.executable, str(TESTS / "rank_faults.py"), str(folder), *faults],
        env=os.environ | alone | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=150,
    )
    return result.returncode, result.stderr, time.monotonic()


def test_lost_processes_end_all_and_torchrun_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, image_folder(tmp_path / "images"))
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    settings["train"] |= {"checkpointing_steps": 2, "heartbeat_timeout": TIMEOUT}
    settings["validation"] = {"validation_prompts": ["red"], "validation_steps": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    code, errors, ended = launch(tmp_path, *FAULTS)
    assert code != 0
    times = {path.name: path.read_text().split() for path in tmp_path.glob("*-[0-9]*")}
    for number, fault in enumerate(FAULTS):
        kind, rank, _ = fault.split("-")
        pid = times[f"begun-{number}-{rank}"][1]
        fate = "has died" if kind == "KILL" else f"has given no sign of life for {TIMEOUT} s"
        lines = [line for line in errors.splitlines() if f"rank {rank} of 2 (process {pid} on " in line]
        assert len(lines) == 1 and fate in lines[0] and "the same command goes on" in lines[0], errors
        # torchrun begins anew, or ends, only once all processes have ended.
        after = [float(times[f"begun-{number + 1}-{other}"][0]) for other in (0, 1) if number + 1 < len(FAULTS)]
        assert min([*after, ended]) - float(times[f"fault-{number}"][0]) < LIMIT, fault
    assert not any(Path(f"/proc/{words[1]}").exists() for name, words in times.items() if name.startswith("begun"))
    code, errors, _ = launch(tmp_path)
    assert code == 0 and "error" not in errors, errors
    runs = [checkpoint.load(tmp_path / name) for name in ("unbroken", "broken")]
    assert all(run is not None and run.state["step"] == config.train.max_train_steps for run in runs)
    assert_same(*cast(Any, runs))


# --- one process, whose threads are the ranks ------------------------------------------------------------------------


class Ranks:
    """Heartbeats of one another; `ended` are the codes with which threads would have ended their processes."""

    def __init__(self) -> None:
        self.all: list[Heartbeat] = []
        self.ended: list[int] = []
        self.over = threading.Event()

    def start(self, world: int, timeout: float = 60) -> list[Heartbeat]:
        port: Future[int] = Future()

        def share(given: int) -> int:
            if given:
                port.set_result(given)
            return port.result(10)

        with ThreadPoolExecutor(world) as pool:
            self.all = list(pool.map(lambda rank: Heartbeat(rank, world, timeout, share), range(world)))
        return self.all

    def exit(self, code: int) -> None:
        """In the place of os._exit: nothing more is done, until the test is over."""
        self.ended.append(code)
        self.over.wait()

    def wait(self, count: int, seconds: float = 10) -> None:
        """Until so many have ended."""
        limit = time.monotonic() + seconds
        while len(self.ended) < count and time.monotonic() < limit:
            time.sleep(0.01)
        assert self.ended == [1] * count


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    made = Ranks()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    monkeypatch.setattr(heartbeat, "GRACE", 0.5)
    monkeypatch.setattr(os, "_exit", made.exit)
    yield made
    for rank in made.all:
        rank._leaving.set()
        if rank._deciding.locked():  # where a process would have ended
            rank._deciding.release()
    made.over.set()
    for rank in made.all:
        if rank._peers[0].tether.fileno() > 0:
            rank.leave("the test is over")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_ask" in thread.name or thread.name == "heartbeat"]


def leave(*ranks: Heartbeat, error: str = "") -> None:
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(lambda rank: rank.leave(error), ranks))


@pytest.mark.parametrize("error", ["", "metadata.jsonl: none of it"])
def test_all_that_leave_together_leave_in_peace(ranks: Ranks, capfd: pytest.CaptureFixture[str], error: str) -> None:
    made = ranks.start(3, timeout=0.5)
    assert len(threads()) == 3 + 4  # each one that watches, and one for each end of a connection
    time.sleep(1)  # twice the timeout
    begun = time.monotonic()
    leave(*made, error=error)
    assert time.monotonic() - begun < 0.5
    while threads():  # which may be told and not have run yet
        assert time.monotonic() - begun < 10
        time.sleep(0.01)
    assert not ranks.ended and capfd.readouterr() == ("", "")


def test_who_is_done_first_waits_for_the_others(ranks: Ranks) -> None:
    """Or one that froze at the end would never be missed."""
    first, second = ranks.start(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.leave)
        time.sleep(0.3)
        assert not waiting.done()
        second.leave()
        waiting.result(1)
    assert not ranks.ended


@pytest.mark.parametrize("failed", [0, 2])
def test_one_that_fails_alone_ends_the_others_by_name(
    ranks: Ranks, capfd: pytest.CaptureFixture[str], failed: int
) -> None:
    made = ranks.start(3)
    begun = time.monotonic()
    made[failed].leave("ValueError: what it says\x1b[2J")
    assert not ranks.ended
    ranks.wait(2)
    assert heartbeat.GRACE < time.monotonic() - begun < heartbeat.GRACE + 1
    lines = capfd.readouterr().err.split("\n\n")
    assert len(lines) == 2 and len({line.strip() for line in lines}) == 1
    assert f"error: rank {failed} of 3 (process {os.getpid()} on " in lines[0]
    assert "ended with an error of its own (ValueError: what it says\\x1b[2J); all processes end; the same" in lines[0]


@pytest.mark.parametrize("dead", [0, 2])
def test_one_that_dies_ends_the_others_by_name(ranks: Ranks, capfd: pytest.CaptureFixture[str], dead: int) -> None:
    made = ranks.start(3)
    made[dead]._leaving.set()
    for peer in made[dead]._peers:
        peer.tether.shutdown(2)  # as the kernel does
    ranks.wait(2, 1)
    errors = capfd.readouterr().err
    assert errors.count("error:") == errors.count(f"rank {dead} of 3 ") == errors.count("has died;") == 2


@pytest.mark.parametrize("frozen", [0, 2])
def test_one_that_is_silent_ends_the_others_by_name(
    ranks: Ranks, capfd: pytest.CaptureFixture[str], frozen: int
) -> None:
    made = ranks.start(3, timeout=1)
    thaw = threading.Event()
    for rank in made:
        for peer in rank._peers:
            if peer.rank == frozen:
                peer.store = cast(Any, SimpleNamespace(check=lambda keys: thaw.wait()))
    made[frozen]._leaving.set()
    begun = time.monotonic()
    ranks.wait(2)
    thaw.set()
    assert 0.9 < time.monotonic() - begun < 5
    errors = capfd.readouterr().err
    assert errors.count("error:") == errors.count(f"rank {frozen} of 3 ") == 2
    assert errors.count("has given no sign of life for 1 s;") == 2


def test_nobody_is_blamed_for_the_time_in_which_the_one_who_looks_stood_still(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = 0.0
    plain = time.monotonic
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: plain() + late)
    made = ranks.start(2, timeout=2)
    for _ in range(5):
        time.sleep(0.1)
        late += 100
    leave(*made)
    assert not ranks.ended


def test_each_start_agrees_on_a_word_of_its_own_in_a_store_that_outlives_it() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def start(*ranks: int) -> set[str]:
        """The words of a start of three processes, of which these live until they have one."""
        clients = [TCPStore("localhost", store.port, wait_for_workers=False) for _ in ranks]
        with ThreadPoolExecutor(len(ranks)) as pool:
            return set(pool.map(agree, clients, ranks, [3] * len(ranks)))

    words = [start(0, 1, 2)]
    for rank in (1, 2):
        store.set(f"arrived/{rank}", f"one that died then, {rank}")
    words += [start(2, 1, 0), start(0, 1, 2)]
    assert [len(each) for each in words] == [1, 1, 1] and len(set.union(*words)) == 3


def test_those_who_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "MEETING", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match=r"rank 0 of 2 .*do not reach one another.*open the ports"):
        Heartbeat(0, 2, 60, lambda port: port)


def test_one_process_alone_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "Heartbeat", None)
    with watched(cast(Any, SimpleNamespace(num_processes=1)), 10):
        assert not threads()


@pytest.mark.parametrize(
    ("error", "told", "waits"),
    [
        (None, "", False),
        (InputError("no such picture"), "no such picture", False),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", False),
        (RuntimeError("Connection closed\nby peer"), "RuntimeError: Connection closed by peer", True),
    ],
)
def test_what_one_that_leaves_says(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, told: str, waits: bool
) -> None:
    said: list[str] = []
    slept: list[float] = []
    double = SimpleNamespace(leave=lambda words="": said.append(words))
    monkeypatch.setattr(heartbeat, "Heartbeat", lambda *given: double)
    monkeypatch.setattr(heartbeat.time, "sleep", slept.append)
    several = cast(Any, SimpleNamespace(num_processes=2, process_index=1))
    with pytest.raises(type(error)) if error else nullcontext(), watched(several, 10):
        if error:
            raise error
    assert [words.strip() for words in said] == [told.strip()]
    assert slept == ([heartbeat.PATIENCE] if waits else [])


# --- a process that is busy, and then frozen -------------------------------------------------------------------------

BUSY = """
import ctypes, sys
from training.heartbeat import Heartbeat
Heartbeat(1, 2, 60, lambda port: int(sys.argv[1]))
sys.stdin.readline()
ctypes.PyDLL(None).sleep(3)  # with the lock of the interpreter, which a PyDLL does not give away
print("awake", flush=True)
sys.stdin.readline()
"""


def test_a_process_whose_interpreter_is_busy_is_alive_and_a_stopped_one_is_not(
    ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    child: list[subprocess.Popen[str]] = []

    def share(port: int) -> int:
        command = [sys.executable, "-c", BUSY, str(port)]
        environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
        child.append(
            subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        return port

    rank = Heartbeat(0, 2, 60, share)  # seconds that the other one has to begin
    ranks.all, rank._timeout = [rank], 1
    (process,) = child
    with process:
        assert process.stdin and process.stdout
        begun = time.monotonic()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "awake\n" and time.monotonic() - begun > 2.5
        assert not ranks.ended
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        ranks.wait(1)
        assert time.monotonic() - begun < 3
        assert process.wait(5) == -signal.SIGKILL
    assert f"rank 1 of 2 (process {process.pid} on " in capfd.readouterr().err
