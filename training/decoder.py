"""The program that opens pictures for another process (decoding.py), which ends it when one takes too long.

It imports Pillow, numpy and diffusion_unet.images, and no torch. Standard input is a socket. What goes over it, both
ways, is the length of a JSON object in 4 bytes, big-endian, that object, and as many bytes as it says under "bytes": of
a file one way, of pixels the other.
"""

import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion_unet.errors import InputError
from diffusion_unet.images import image_size, open_image, to_array

MEMORY = 512 * 10**6  # bytes that one file may take, its own and those of its pixels
ALONE = 20.0  # seconds with one file after which a process ends itself that nobody has ended
LENGTH = struct.Struct(">I")


def head(about: Mapping[str, Any], count: int) -> bytes:
    """What goes over the socket before `count` bytes."""
    text = json.dumps({**about, "bytes": count}).encode()
    return LENGTH.pack(len(text)) + text


def serve() -> None:
    """Answers requests until the process that sends them is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the process that this one works for, which may go on
        signal.signal(number, signal.SIG_IGN)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # it writes nothing, and leaves nothing behind
        resource.setrlimit(kind, (0, 0))
    Image.init()  # the decoders, none of which is then read from a slow disk in the time of a picture
    with suppress(ImportError):  # older Pillows have none
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each has a stack, which counts as memory
    parent, link = os.getppid(), socket.socket(fileno=0)
    link.sendall(head({"ready": True}, 0))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libraries tell of damaged files there, in words of their own
    picture = None
    while (request := _receive(link, parent)) is not None:
        signal.setitimer(signal.ITIMER_REAL, ALONE)  # its signal ends the process, whatever library it is in
        about: dict[str, Any] = {}
        pixels = np.empty(0, np.uint8)
        try:
            if "cover" in request[0]:
                assert picture is not None
                pixels = _pixels(picture, request[0]["cover"])
                about = {"shape": pixels.shape}
            else:
                picture = None
                size, picture = _opened(*request)
                about = {"size": size}
        except InputError as error:
            about = {"no_memory": True} if isinstance(error.__cause__, MemoryError) else {"error": str(error)}
        except MemoryError:
            about = {"no_memory": True}
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            link.settimeout(None)
            link.sendall(head(about, pixels.nbytes))
            link.sendall(pixels.data)
        except OSError:
            return


def _opened(request: Mapping[str, Any], content: bytes) -> tuple[tuple[int, int], Image.Image | None]:
    """(W, H), and the picture unless only its size is asked for. Raises InputError, MemoryError."""
    _limit_memory(len(content))
    source = content if request["path"] is None else request["path"]
    if request["only_size"]:
        return image_size(source, name=request["name"]), None
    picture = open_image(source, request["channels"], tuple(request["background"]), name=request["name"])
    return picture.size, picture


def _pixels(picture: Image.Image, cover: Sequence[int] | None) -> NDArray[np.uint8]:
    """[H, W, C], as it is or to cover (H, W)."""
    if cover is None:
        return np.asarray(picture).reshape(picture.height, picture.width, -1)
    return np.ascontiguousarray(to_array(picture, (cover[0], cover[1])))


def _limit_memory(held: int) -> None:
    """MEMORY more than the process has before a file, of which it holds so many bytes. Other systems than Linux have
    no such limit."""
    if sys.platform == "linux":
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = taken - held + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _receive(link: socket.socket, parent: int) -> tuple[dict[str, Any], bytes] | None:
    """A request and the bytes of its file; None once there is nobody to send one."""
    length = _take(link, LENGTH.size, parent)
    text = length and _take(link, LENGTH.unpack(length)[0], parent)
    if not text:
        return None
    request = json.loads(text)
    content = _take(link, request["bytes"], parent)
    return None if content is None else (request, content)


def _take(link: socket.socket, count: int, parent: int) -> bytes | None:
    """The next `count` bytes; None once the parent is gone, though a fork of it may hold its end of the socket open."""
    data = bytearray(count)
    rest = memoryview(data)
    link.settimeout(1)
    while rest:
        try:
            got = link.recv_into(rest)
        except TimeoutError:
            if os.getppid() != parent:
                return None
            continue
        except OSError:
            return None
        if got == 0:
            return None
        rest = rest[got:]
    return bytes(data)


if __name__ == "__main__":
    serve()
