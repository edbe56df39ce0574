"""Images and captions from strangers: the whole corpus, and the processes that open them."""

import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hostile_files import PLAIN, RGB, Hostile, images
from hostile_looks import LAYOUTS, looked_at
from tiny_images import png8

from diffusion_unet.errors import Failure, InputError
from training import decoding
from training.config import DataConfig
from training.data import inspect, open_data
from training.decoding import SECONDS, Decoders

ROOT = Path(__file__).resolve().parent.parent
WHITE = (255, 255, 255)
# What a library might do with a file, by the name of the file.
PROGRAM = """
    import os, sys, time
    from training import decoder

    def opened(source, *given, name):
        if name == "sleeps": time.sleep(60)
        if name == "naps": time.sleep(2.5)
        if name == "spins":
            while True: pass
        if name == "aborts": os.abort()
        if name == "leaves": os._exit(3)
        if name == "takes": bytearray(2 * decoder.MEMORY)
        if name == "writes": open(os.environ["TMPDIR"] + "/written", "wb").write(bytes(10))
        return real(source, *given, name=name)

    real, decoder.open_image = decoder.open_image, opened
    decoder.serve()
"""


@pytest.fixture(scope="module")
def items() -> list[Hostile]:
    return list(images())


@pytest.fixture
def decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders]:
    """Two processes that do what PROGRAM says."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    made = Decoders(2, (str(program),))
    yield made
    made.close()


def whole(decoders: Decoders, name: str = "good") -> bool:
    return np.array_equal(np.array(decoders.open_image(PLAIN, 3, name=name)), RGB)


def pids(decoders: Decoders) -> list[int]:
    return [decoder.process.pid for decoder in decoders._free]


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends; one that nobody has waited for yet counts as ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hostile_files_are_refused_by_name_or_have_their_pixels(
    tmp_path: Path, items: list[Hostile], layout: str
) -> None:
    results = list(looked_at(tmp_path / "data" / "images", items, layout))
    assert len(results) > 100 and not [result for result in results if not result["ok"]]


def test_pixels_are_those_of_the_library(tmp_path: Path) -> None:
    from diffusion_unet import images as library

    (tmp_path / "a.png").write_bytes(png8(np.dstack([RGB, RGB[..., 0]]), 6))
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        for channels in (1, 3):
            expected = library.open_image(source, channels, (9, 8, 7))
            got = decoding.open_image(source, channels, (9, 8, 7), name="a")
            assert got.mode == expected.mode and np.array_equal(np.array(got), np.array(expected))
            scaled = decoding.open_array(source, channels, (9, 8, 7), lambda size: (size[0], 40), name="a")
            assert scaled.flags.writeable and np.array_equal(scaled, library.to_array(expected, (9, 40)))
        assert decoding.image_size(source, name="a") == (9, 6)


def test_a_table_with_text_that_is_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    ends, text = struct.pack("<III", 0, 1, 4), b"a\xff\xfeb"
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, *map(pyarrow.py_buffer, (ends, text))])
    pictures = pyarrow.array([{"bytes": PLAIN, "path": None}] * 2)
    parquet.write_table(pyarrow.table({"image": pictures, "text": texts}), tmp_path / "a.parquet")
    config = DataConfig(train_data_dir=str(tmp_path / "a.parquet"), resolution=8)
    dataset = inspect(open_data(config, 3), config, 3)
    assert dataset.captions == [["a"]] and np.array_equal(np.array(dataset.source.image(0)), RGB)
    assert "row 2" in dataset.bad[0].name and "utf-8" in dataset.bad[0].reason


# ---- a file that does not come to an end ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sleeps", "spins"])
def test_a_file_that_takes_too_long_is_refused_and_the_others_go_on(decoders: Decoders, name: str) -> None:
    assert whole(decoders)
    first = pids(decoders)[0]
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(whole, decoders, name)
        time.sleep(0.3)
        assert whole(decoders) and not slow.done()
        with pytest.raises(InputError, match=f"^{name} takes longer than 2 s to decode$"):
            slow.result()
    assert time.monotonic() - begun >= SECONDS
    assert whole(decoders) and first not in pids(decoders) and gone(first)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("aborts", r"ends its decoder \(signal 6\)"),
        ("leaves", r"ends its decoder \(exit code 3\)"),
        ("takes", "needs more than 512 MB to decode"),
    ],
)
def test_a_file_that_is_the_end_of_its_decoder_is_refused(decoders: Decoders, name: str, reason: str) -> None:
    assert whole(decoders)
    with pytest.raises(InputError, match=f"^{name} {reason}$") as caught:
        whole(decoders, name)
    assert "\n" not in str(caught.value)
    assert whole(decoders) and len(pids(decoders)) == 1


def test_a_decoder_writes_no_file(decoders: Decoders, tmp_path: Path) -> None:
    assert whole(decoders, "writes")
    assert not (tmp_path / "written").read_bytes()


def test_memory_is_counted_anew_for_each_file(decoders: Decoders) -> None:
    side = 4000  # 16 MB in grey and 64 MB in colour, so that eight of them would be too many
    large = png8(np.zeros((side, side), np.uint8), 0)
    for _ in range(8):
        assert decoders.open_array(large, 3, WHITE, lambda _: (4, 4), name="large").shape == (4, 4, 3)
    assert len(pids(decoders)) == 1


def test_a_busy_machine_makes_no_file_too_slow(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole(decoders)
    queued = iter([0.0, *range(100, 200)])
    monkeypatch.setattr(decoding._Decoder, "_queued", lambda self: next(queued))
    assert whole(decoders, "naps")


def test_a_size_that_is_not_wanted_costs_no_process(decoders: Decoders) -> None:
    def small(size: tuple[int, int]) -> tuple[int, int]:
        raise InputError(f"{size[0]}x{size[1]}")

    assert whole(decoders)
    first = pids(decoders)
    with pytest.raises(InputError, match=r"^9x6$"):
        decoders.open_array(PLAIN, 3, WHITE, small, name="small")
    assert whole(decoders) and pids(decoders) == first


def test_no_more_processes_than_were_asked_for(decoders: Decoders) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: whole(decoders), range(40)))
    assert 1 <= len(pids(decoders)) <= 2
    ended = pids(decoders)
    decoders.close()
    assert not pids(decoders) and all(gone(pid) for pid in ended)
    assert whole(decoders)


def test_a_program_that_does_not_start_is_no_fault_of_a_file() -> None:
    with pytest.raises(Failure, match=r"pictures cannot be opened: .* \(exit code 3\)") as caught:
        Decoders(1, ("-c", "raise SystemExit(3)")).open_image(PLAIN, 3, name="a")
    assert not isinstance(caught.value, InputError)


# ---- whose processes they are --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_decoder_has_no_torch_and_heeds_no_signal_but_the_last(decoders: Decoders) -> None:
    assert whole(decoders)
    first = pids(decoders)[0]
    assert "torch" not in Path(f"/proc/{first}/maps").read_text()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(first, number)
    assert whole(decoders) and pids(decoders) == [first]
    os.kill(first, signal.SIGKILL)  # between two files, of which neither is to blame
    assert gone(first)
    assert whole(decoders) and pids(decoders) != [first]


LOOKS = """
    import os, sys, threading, time
    from pathlib import Path
    from training import decoding

    file = Path(sys.argv[1])
    decoding.open_image(file, 3, name="a")
    if sys.argv[2] == "fork" and os.fork() == 0:
        decoding.open_image(file, 3, name="a")
        print("fork", *[one.process.pid for one in decoding._decoders._free], flush=True)
        os._exit(0)
    decoding.open_image(file, 3, name="a")
    print(*[one.process.pid for one in decoding._decoders._free], flush=True)
    if sys.argv[2] == "loop":
        threads = [threading.Thread(target=lambda: [decoding.open_image(file, 3, name="a") for _ in range(10**6)])]
        threads[0].daemon = True
        threads[0].start()
    if sys.argv[2] != "fork":
        time.sleep(60)
"""


def looking(tmp_path: Path, how: str) -> tuple[subprocess.Popen[str], int]:
    """A process in a group of its own that has opened pictures, and the id of the one that did."""
    (tmp_path / "looks.py").write_text(textwrap.dedent(LOOKS))
    (tmp_path / "a.png").write_bytes(PLAIN)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "looks.py"), str(tmp_path / "a.png"), how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["idle", "loop"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_decoder_outlives_its_parent(tmp_path: Path, how: str, number: signal.Signals) -> None:
    process, decoder = looking(tmp_path, how)
    with process:
        assert Path(f"/proc/{decoder}").exists()
        os.killpg(process.pid, number)
        assert process.wait(10) != 0
    assert gone(decoder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fork_starts_its_own(tmp_path: Path) -> None:
    (tmp_path / "looks.py").write_text(textwrap.dedent(LOOKS))
    (tmp_path / "a.png").write_bytes(PLAIN)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "looks.py"), str(tmp_path / "a.png"), "fork"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = sorted(done.stdout.split("\n"))[1:]
    assert done.returncode == 0 and len(lines) == 2 and lines[1].startswith("fork "), done
    assert lines[1].split()[1] != lines[0] and len(lines[1].split()) == 2


@pytest.mark.parametrize(("processes", "count"), [(1, decoding.THREADS), (1000, 1)])
def test_the_processes_of_a_run_share_the_cores(processes: int, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from training import decoding; print(decoding._decoders.count)"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": str(processes)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"{count}\n", done
