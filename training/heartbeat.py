"""Where one process of several dies, freezes or fails, the others end within seconds: they would wait for it for a day.

Rank 0 and each other rank hold a connection. The kernel tells at once when the other end of it has died, and a process
that leaves says so there. A frozen one keeps its connection; so each asks the other, every second, for a sign of life.
That is given by a TCPStore, a thread of torch in C++: of a process that is stopped it is silent, but it answers while
the interpreter is busy for a minute, as it is when it parses much JSON or tokenizes a long text, where no Python thread
would. What rank 0 finds of one process it tells the others.
"""

import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from diffusion_unet.arguments import plain
from diffusion_unet.errors import Failure, InputError

MEETING = 30.0  # seconds in which the processes reach one another
BEAT = 1.0  # seconds between two questions
GRACE = 5.0  # seconds in which all end by themselves, once one has left with an error
PATIENCE = 3.0  # seconds in which what failed here may turn out to come of another process's death
REMEDY = "all processes end; the same command goes on from the last checkpoint"


@contextmanager
def watched(accelerator: Accelerator, timeout: float) -> Iterator[None]:
    """Within it all processes end, with code 1 and a line on stderr that names it, where one dies, freezes or fails.

    timeout: seconds without a sign of life after which a process counts as dead. One process alone is not watched.
    Raises InputError where the processes do not reach one another."""
    if accelerator.num_processes == 1:
        yield
        return

    def share(port: int) -> int:
        told = torch.tensor([port], device=accelerator.device)
        return int(broadcast(told, from_process=0).item())

    heartbeat = Heartbeat(accelerator.process_index, accelerator.num_processes, timeout, share)
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, Failure):
            time.sleep(PATIENCE)
        text = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        heartbeat.leave(" ".join(text.split())[:500])
        raise
    heartbeat.leave()


@dataclass(eq=False)
class Peer:
    """The process at the other end of a connection."""

    rank: int
    name: str  # for people
    tether: socket.socket
    words: BinaryIO  # what it says there: a line, before it leaves
    store: TCPStore  # its own, which is asked
    silent: float = 0.0  # seconds
    left: bool = False
    error: str = ""  # with which it left


class Heartbeat:
    """One process's part, from when all of them make theirs until it leaves.

    share: called once by each process, gives all of them the number with which rank 0 calls it; the others give 0.
    Raises InputError where the processes do not reach one another."""

    def __init__(self, rank: int, world: int, timeout: float, share: Callable[[int], int]):
        self._timeout = timeout
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # is asked by others
        pid, place = os.getpid(), _place()
        name = f"rank {rank} of {world} (process {pid} on {socket.gethostname()})"
        card = {"rank": rank, "name": name, "pid": pid, "place": place, "port": self._store.port}
        try:
            self._peers, cards = _meet(card, world, share)
        except (OSError, ValueError, DistError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{name} and the others do not reach one another by MASTER_ADDR={os.environ['MASTER_ADDR']} ({reason}):"
                " open the ports between the machines"
            ) from None
        # Descriptors of processes on this machine, which stand for nothing else even once a process has ended.
        self._near: dict[int, int] = {}
        for other in cards:
            if place and other["place"] == place and other["pid"] != pid:
                with suppress(OSError):
                    self._near[other["rank"]] = os.pidfd_open(other["pid"])
        self._alone, self._leaving, self._deciding = threading.Event(), threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._watch, name="heartbeat", daemon=True)]
        self._threads += [threading.Thread(target=self._ask, args=(peer,), daemon=True) for peer in self._peers]
        for thread in self._threads:
            thread.start()

    def leave(self, error: str = "") -> None:
        """Tells the others that this process is done, and waits until they are; or with which error it ends."""
        self._tell(f"left {error}")
        if not error:
            self._alone.wait()
        with self._deciding:  # never to be had again where the other thread is ending this process
            self._leaving.set()
        for peer in self._peers:
            with suppress(OSError):
                peer.tether.shutdown(socket.SHUT_RDWR)  # which the thread that listens there notices
        for thread in self._threads:
            thread.join(BEAT)
        for peer in self._peers:
            peer.words.close()
            peer.tether.close()
        for descriptor in self._near.values():
            os.close(descriptor)

    def _tell(self, words: str) -> None:
        for peer in self._peers:
            with suppress(OSError):  # of one that is gone
                peer.tether.sendall(f"{words}\n".encode())

    def _ask(self, peer: Peer) -> None:
        """A thread: asks one of the others. Of one that is frozen it waits for an answer for ever."""
        while not (self._leaving.wait(BEAT) or peer.left or _has_news(peer.tether)):
            try:
                peer.store.check(["alive"])
            except DistError:  # it died while it was asked, which its connection tells
                return
            peer.silent = 0.0

    def _watch(self) -> None:
        """A thread: listens to the others, and ends this process once one of them is lost."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.tether, selectors.EVENT_READ, peer)
            last = time.monotonic()
            while not self._leaving.is_set():
                for key, _ in selector.select(BEAT):
                    selector.unregister(key.fileobj)
                    self._listen(key.data)
                # For the time in which this process itself stood still, the others are not to blame.
                now = time.monotonic()
                passed, last = min(now - last, BEAT), now
                for peer in self._peers:
                    peer.silent += passed
                    if peer.error and peer.silent > GRACE:
                        self._end(f"{peer.name} ended with an error of its own ({peer.error})")
                    elif not peer.left and peer.silent > self._timeout:
                        self._end(f"{peer.name} has given no sign of life for {self._timeout:g} s", peer.rank)
                if all(peer.left for peer in self._peers):
                    self._alone.set()

    def _listen(self, peer: Peer) -> None:
        try:
            kind, _, text = peer.words.readline().decode(errors="replace").rstrip("\n").partition(" ")
        except (OSError, ValueError):  # reset, or closed here
            kind = text = ""
        if kind == "lost":
            rank, _, line = text.partition(" ")
            self._end(line, int(rank))
        elif kind == "left":
            peer.left, peer.error, peer.silent = True, text, 0.0
        else:
            self._end(f"{peer.name} has died", peer.rank)

    def _end(self, line: str, lost: int = -1) -> None:
        """Ends this process, whatever its main thread is waiting for, and a lost one that is frozen on this machine.

        lost: the rank of that one, for which a launcher would wait."""
        self._deciding.acquire()
        if self._leaving.is_set():
            self._deciding.release()
            return
        self._tell(f"lost {lost} {line}")
        if lost in self._near:
            with suppress(OSError):
                signal.pidfd_send_signal(self._near[lost], signal.SIGKILL)
        with suppress(OSError):
            os.write(2, f"\nerror: {plain(line)}; {REMEDY}\n".encode())  # sys.stderr may be locked by the main thread
        os._exit(1)


def _meet(card: dict[str, Any], world: int, share: Callable[[int], int]) -> tuple[list[Peer], list[dict[str, Any]]]:
    """Whom this process watches, and the cards of all. Raises OSError, DistError; ValueError for a stranger's words."""
    host = os.environ["MASTER_ADDR"]
    if card["rank"] == 0:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server(("", 0), family=family, backlog=world) as server:
            server.settimeout(MEETING)
            share(server.getsockname()[1])
            tethers = [server.accept()[0] for _ in range(world - 1)]
    else:
        tethers = [socket.create_connection((host, share(0)), MEETING)]
        tethers[0].sendall(f"{json.dumps(card)}\n".encode())
    for tether in tethers:
        tether.settimeout(MEETING)
    words = [tether.makefile("rb") for tether in tethers]
    told = [_read(lines) for lines in words]
    if card["rank"] == 0:
        cards = [card, *told]
        for tether in tethers:
            tether.sendall(f"{json.dumps(cards)}\n".encode())
    else:
        cards = told[0]
        told = [cards[0]]
    wait = timedelta(seconds=MEETING)
    peers = []
    for other, tether, lines in zip(told, tethers, words, strict=True):
        address = tether.getpeername()[0]
        store = TCPStore(address, other["port"], is_master=False, timeout=wait, wait_for_workers=False)
        tether.settimeout(None)
        peers.append(Peer(other["rank"], other["name"], tether, lines, store))
    return peers, cards


def _read(lines: BinaryIO) -> Any:
    line = lines.readline()
    if not line:
        raise ConnectionError("one of them has ended")
    return json.loads(line)


def _has_news(tether: socket.socket) -> bool:
    """Whether the other end has said something, or is closed: torch would tell of that in many lines, if it asked."""
    try:
        tether.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _place() -> str:
    """The machine since it was last started, and the numbering of its processes; empty where there is no telling."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
