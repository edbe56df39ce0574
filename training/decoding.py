"""Pictures opened where they can do no harm: in processes that are ended when one takes too long or too much memory.

`open_image` and `image_size` mean what they mean in diffusion_unet.images; all may be called from several threads. The
process (decoder.py) reads the file too, so that a disk that does not answer holds up that file and nothing else.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion_unet.errors import Failure, InputError
from diffusion_unet.images import WHITE, to_array, to_image

from .decoder import LENGTH, MEMORY, head

SECONDS = 2.0  # that one file may take
STARTING = 60.0  # seconds in which a process is ready
SLICE = 0.1  # seconds between two looks at the clock
THREADS = min(os.cpu_count() or 1, 32)  # of a machine with very many cores, not all: threads wait for one another
ROOT = Path(__file__).resolve().parent.parent
# For glibc: what a file took goes back to the system, so that it is not reckoned to the next one's.
SPARING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 20)}
PROGRAM = ("-m", "training.decoder")
TOO_LONG = f"takes longer than {SECONDS:g} s to decode"
TOO_LARGE = f"needs more than {MEMORY // 10**6} MB to decode"

Cover = Callable[[tuple[int, int]], tuple[int, int]]  # (W, H) of a picture -> (H, W) that is wanted of it


class _Lost(Exception):
    """There is no answer, and the process is of no more use; the text goes on from the name of the file."""


class _Decoder:
    """One process, and the socket to it. Raises Failure where it does not start."""

    waiting = True  # for a request, with nothing of the last one still on its way
    spent = 0.0  # seconds with this file
    queued: float | None = None  # what `_queued` was soon after its beginning

    def __init__(self, program: Sequence[str]):
        self.socket, theirs = socket.socketpair()
        alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **SPARING}
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", *program],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **alone, "PYTHONPATH": path},
                    start_new_session=True,  # out of reach of Ctrl-C, even before it can ignore that
                )
        except OSError as error:
            self.socket.close()
            raise Failure(f"pictures cannot be opened: no process can be started ({error.strerror})") from error
        self.socket.settimeout(SLICE)
        try:
            self._receive(STARTING)
        except _Lost as lost:
            self.end()
            raise Failure(f"pictures cannot be opened: the program that decodes them {lost}") from None

    def open(self, source: Path | bytes, name: str, *, only_size: bool = False, **more: Any) -> dict[str, Any]:
        """Begins with a file. Raises _Lost, InputError."""
        self.spent, self.queued = 0.0, None
        content = source if isinstance(source, bytes) else b""
        if len(content) > MEMORY:
            raise InputError(f"{name} {TOO_LARGE}")
        path = None if isinstance(source, bytes) else str(source)
        return self.ask({"name": name, "path": path, "only_size": only_size, **more}, content)[0]

    def ask(self, request: Mapping[str, Any], content: bytes = b"") -> tuple[dict[str, Any], bytearray]:
        """The answer, and the bytes behind it. Raises _Lost, InputError."""
        self.waiting = False
        self._move(self.socket.send, memoryview(head(request, len(content))))
        self._move(self.socket.send, memoryview(content))
        about, data = self._receive()
        self.waiting = "no_memory" not in about  # what is left of it may be in pieces
        if "no_memory" in about:
            raise _Lost(TOO_LARGE)
        if "error" in about:
            raise InputError(about["error"])
        return about, data

    def _receive(self, seconds: float = SECONDS) -> tuple[dict[str, Any], bytearray]:
        length = bytearray(LENGTH.size)
        self._move(self.socket.recv_into, memoryview(length), seconds)
        text = bytearray(LENGTH.unpack(length)[0])
        self._move(self.socket.recv_into, memoryview(text), seconds)
        about = json.loads(text)
        data = bytearray(about["bytes"])
        self._move(self.socket.recv_into, memoryview(data), seconds)
        return about, data

    def _move(self, act: Callable[[memoryview], int], rest: memoryview, seconds: float = SECONDS) -> None:
        """All of `rest` through the socket."""
        while rest:
            begun = time.monotonic()
            try:
                moved = act(rest)
            except TimeoutError:
                # A slice that took longer is one in which this process itself was halted.
                self.spent += min(time.monotonic() - begun, 2 * SLICE)
                self.queued = self._queued() if self.queued is None else self.queued
                if self.spent >= seconds and self.spent - (self._queued() - self.queued) >= seconds:
                    raise _Lost(TOO_LONG) from None
                continue
            except OSError:
                moved = 0
            if moved == 0:
                raise _Lost(self._how_it_ended())
            rest = rest[moved:]

    def _queued(self) -> float:
        """Seconds for which it was ready to run and no core was free: where Linux tells, a file that a busy machine
        delays is not refused, and a run has the same samples however busy that is."""
        try:
            return int(Path(f"/proc/{self.process.pid}/schedstat").read_bytes().split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            code = 0
        if code == -signal.SIGALRM:
            return TOO_LONG
        return f"ends its decoder ({f'signal {-code}' if code < 0 else f'exit code {code}'})"

    def end(self) -> None:
        """Whatever it is doing."""
        self.process.kill()
        self.socket.close()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk ends when that answers
            self.process.wait(1)


def fit(image: Image.Image, channels: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image scaled to cover (H, W), what sticks out cropped away: [H, W, C]."""
    return to_array(image.convert("RGB" if channels == 3 else "L"), size)


class Decoders:
    """Processes that open pictures: started when they are needed, each replaced when a file was its end.

    count: how many at most; program: what they run, as arguments of Python. What is said of errors holds for all
    methods: InputError as of diffusion_unet.images, and for a file that takes more than SECONDS or MEMORY or ends its
    process; Failure where no process can be started.
    """

    def __init__(self, count: int, program: Sequence[str] = PROGRAM):
        self.count, self.program = count, program
        self._free: list[_Decoder] = []
        self._lock, self._room = threading.Lock(), threading.Semaphore(count)

    def image_size(self, source: Path | bytes, *, name: str) -> tuple[int, int]:
        """As images.image_size."""
        with self._one(name) as decoder:
            width, height = decoder.open(source, name, only_size=True)["size"]
        return width, height

    def open_image(
        self, source: Path | bytes, channels: int, background: tuple[int, int, int] = WHITE, *, name: str
    ) -> Image.Image:
        """As images.open_image."""
        return to_image(self._pixels(source, channels, background, None, name))

    def open_array(
        self, source: Path | bytes, channels: int, background: tuple[int, int, int], cover: Cover, *, name: str
    ) -> NDArray[np.uint8]:
        """`open_image`, and of that images.to_array: [H, W, C], of the (H, W) that `cover` says for its (W, H)."""
        return self._pixels(source, channels, background, cover, name)

    def close(self) -> None:
        """Ends the processes that are not at work; others are started when they are needed again."""
        with self._lock:
            free, self._free = self._free, []
        for decoder in free:
            decoder.end()

    def _pixels(
        self, source: Path | bytes, channels: int, background: tuple[int, int, int], cover: Cover | None, name: str
    ) -> NDArray[np.uint8]:
        with self._one(name) as decoder:
            width, height = decoder.open(source, name, channels=channels, background=background)["size"]
            about, pixels = decoder.ask({"cover": cover and cover((width, height))})
        return np.frombuffer(pixels, np.uint8).reshape(about["shape"])

    @contextmanager
    def _one(self, name: str) -> Iterator[_Decoder]:
        """A process for a file; afterwards it is another's, or if it is not fit for that, ended."""
        with self._room:
            decoder = self._take()
            try:
                yield decoder
            except _Lost as lost:
                raise InputError(f"{name} {lost}") from None
            finally:
                if decoder.waiting:
                    with self._lock:
                        self._free.append(decoder)
                else:
                    decoder.end()

    def _take(self) -> _Decoder:
        """The one that was at work last, of those that nobody has ended meanwhile."""
        while True:
            with self._lock:
                decoder = self._free.pop() if self._free else None
            if decoder is None:
                return _Decoder(self.program)
            if decoder.process.poll() is None:
                return decoder
            decoder.end()

    def leave(self) -> None:
        """In a fork: the processes are those of the one that started them."""
        for decoder in self._free:
            decoder.socket.close()
            decoder.process.returncode = 0  # none of this one's, to wait for
        self._free, self._lock, self._room = [], threading.Lock(), threading.Semaphore(self.count)


_decoders = Decoders(max(1, THREADS // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
image_size, open_image, open_array = _decoders.image_size, _decoders.open_image, _decoders.open_array
atexit.register(_decoders.close)
os.register_at_fork(after_in_child=_decoders.leave)
