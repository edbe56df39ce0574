"""Stores on disk: what is read is what was computed, whatever was killed, damaged or changed in between."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_unet.conditioning import Conditioning, new_text_encoder, train_tokenizer
from diffusion_unet.errors import InputError, SaveError
from training import cache
from training.cache import Store, build, find, fingerprint, module_digest, others, text_rows

PRINT = fingerprint("a codec", {"resolution": 64})
TESTS = Path(__file__).parent

KILLED = """
import os, signal, sys
from pathlib import Path
from training import cache
from test_cache import PRINT, entry

folder, moment = Path(sys.argv[1]), sys.argv[2]
computed = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def compute(entries):
    computed.append(entries)
    if moment == "computing" and len(computed) == 3:
        die()
    if moment == "renaming" and len(computed) == 3:
        os.replace = lambda *paths: die()
    return [entry(i) for i in entries]

if moment == "manifest":
    cache.write_json = lambda *arguments: die()
cache.build(folder, PRINT, 10, compute, shard_size=2)
"""


def entry(number: int) -> dict[str, Tensor]:
    """Different numbers, and different shapes, of every entry."""
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(8, 2 + number % 3, 4 - number % 3, generator=generator)
    return {"moments": latents, "pooled.half": latents.mean((1, 2)).half(), "mask": latents[0] > 0}


class Computing:
    """A computation that remembers what it was asked for."""

    def __init__(self, make: Callable[[int], dict[str, Tensor]] = entry):
        self.make, self.asked = make, []

    def __call__(self, entries: Sequence[int]) -> list[dict[str, Tensor]]:
        self.asked.append(list(entries))
        return [self.make(number) for number in entries]


def assert_holds(store: Store, entries: Sequence[int]) -> None:
    for number, row in zip(entries, store.rows(entries), strict=True):
        expected = entry(number)
        assert row.keys() == expected.keys()
        for name, tensor in row.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])


def test_what_is_read_is_what_was_computed(tmp_path: Path) -> None:
    computing, seen = Computing(), []

    def watch(entries: Iterator[Any], count: int) -> Iterator[Any]:
        seen.append(count)
        for number in entries:
            seen.append(number)
            yield number

    assert find(tmp_path, PRINT) is None
    store = build(tmp_path / "deep", PRINT, 10, computing, shard_size=4, watch=watch)
    assert computing.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and seen == [10, *range(10)]
    assert len(store) == 10 and store.path == tmp_path / "deep" / PRINT[:16]
    assert_holds(store, range(10))
    assert_holds(store, [9, 0, 0, 5, -3 + 10])
    again = find(tmp_path / "deep", PRINT)
    assert again is not None
    assert_holds(again, [3, 8])
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            store.rows([wrong])
    build(tmp_path / "deep", PRINT, 10, computing, shard_size=4)
    assert len(computing.asked) == 3
    assert len(build(tmp_path / "none", PRINT, 0, computing)) == 0 and len(computing.asked) == 3


def test_rows_are_the_callers_own(tmp_path: Path) -> None:
    store = build(tmp_path, PRINT, 4, Computing())
    store.rows([2])[0]["moments"].zero_()
    assert_holds(store, [2])


def test_rows_that_share_their_memory(tmp_path: Path) -> None:
    batch = torch.randn(4, 3)
    rows = [{"a": batch[0]}, {"a": batch[0]}, {"a": batch[1].expand(2, 3)}, {"a": batch.T}]
    store = build(tmp_path, PRINT, 4, lambda entries: rows)
    for expected, row in zip(rows, store.rows(range(4)), strict=True):
        assert torch.equal(row["a"], expected["a"])
    assert sum(file.stat().st_size for file in store.path.glob("*.safetensors")) < 1000


def test_computations_of_the_wrong_form(tmp_path: Path) -> None:
    x = torch.zeros(2)
    for rows in ([{"a": x}], [{"a": x}, {"b": x}], [{}, {}]):
        with pytest.raises(ValueError, match="2 entries"):
            build(tmp_path, PRINT, 2, lambda entries, rows=rows: rows)
        assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("moment", "left"), [("computing", [2, 3, 4]), ("renaming", [2, 3, 4]), ("manifest", [])])
def test_a_build_that_was_killed_goes_on(tmp_path: Path, moment: str, left: list[int]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert find(tmp_path, PRINT) is None
    unfinished = list(tmp_path.glob("*/.*.tmp"))
    assert len(unfinished) == (moment == "renaming")
    computing = Computing()
    assert_holds(build(tmp_path, PRINT, 10, computing, shard_size=2), range(10))
    assert computing.asked == [[2 * shard, 2 * shard + 1] for shard in left]
    assert find(tmp_path, PRINT) is not None
    for file in unfinished:  # kept while it may be another process's
        assert file.exists()
        os.utime(file, (0, time.time() - 2 * cache.ABANDONED))
    build(tmp_path, PRINT, 10, computing, shard_size=2)
    assert not list(tmp_path.glob("*/.*.tmp"))


def damage(path: Path, how: str, other: Path) -> None:
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "short": whole[:-1],
        "long": whole + b"0",
        "header": b"\xff" * 64 + whole[64:],
        "another": other.read_bytes(),
        "fingerprint": whole.replace(PRINT.encode(), PRINT[::-1].encode()),
    }
    path.unlink() if how == "gone" else path.write_bytes(contents[how])


@pytest.mark.parametrize("how", ["gone", "empty", "short", "long", "header", "another", "fingerprint"])
def test_damaged_shards_are_made_again(tmp_path: Path, how: str) -> None:
    store = build(tmp_path, PRINT, 10, Computing(), shard_size=4)
    damage(store.shard(1), how, store.shard(0))
    if how != "fingerprint":
        with pytest.raises(InputError, match=r"shard-00001.* remove it") as caught:
            Store(store.path, PRINT, 10, 4).rows([0, 5])
        assert "\n" not in str(caught.value)
    computing = Computing()
    assert_holds(build(tmp_path, PRINT, 10, computing, shard_size=4), range(10))
    assert computing.asked == [[4, 5, 6, 7]]


def test_other_counts_and_sizes_of_shards(tmp_path: Path) -> None:
    build(tmp_path, PRINT, 10, Computing(), shard_size=4)
    for count, shard_size in ((11, 4), (11, 3), (5, 3)):
        store = build(tmp_path, PRINT, count, Computing(), shard_size=shard_size)
        assert_holds(store, range(count))
        found = find(tmp_path, PRINT)
        assert found is not None and (found.count, found.shard_size) == (count, shard_size)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}', None, "changed"])
def test_stores_without_their_manifest_are_not_finished(tmp_path: Path, text: str | None) -> None:
    path = build(tmp_path, PRINT, 3, Computing()).path / "manifest.json"
    values = json.loads(path.read_text())
    assert values == {"format": 1, "fingerprint": PRINT, "count": 3, "shard_size": 256}
    if text is None:
        path.unlink()
    else:
        path.write_text(json.dumps(values | {"fingerprint": PRINT[::-1]}) if text == "changed" else text)
    assert find(tmp_path, PRINT) is None
    computing = Computing()
    build(tmp_path, PRINT, 3, computing)
    assert computing.asked == [] and json.loads(path.read_text()) == values


def test_another_fingerprint_is_another_store(tmp_path: Path) -> None:
    changed = fingerprint("a codec", {"resolution": 72})
    first = build(tmp_path, PRINT, 3, Computing())
    second = build(tmp_path, changed, 3, Computing(lambda number: {"moments": torch.full((2,), float(number))}))
    assert_holds(first, range(3))
    assert second.rows([2])[0]["moments"].tolist() == [2.0, 2.0]
    (tmp_path / "notes").mkdir()
    size = sum(file.stat().st_size for file in first.path.iterdir())
    assert others(tmp_path, changed) == {first.path: size} and others(tmp_path / "none", PRINT) == {}


def test_fingerprints() -> None:
    parts: list[tuple[Any, ...]] = [
        (), ("",), ("a",), ("a", "b"), ("ab",), (["a", "b"],), ({"a": "b"},), (1,), ("1",), (1.5,), (None,), (True,),
    ]  # fmt: skip
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) and len(fingerprint()) == 64
    for wrong in (Path("a"), float("nan"), torch.zeros(1)):
        with pytest.raises((TypeError, ValueError)):
            fingerprint(wrong)


def test_digests_of_weights() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    digest = module_digest(module)
    assert digest == module_digest(module.eval()) and len(digest) == 64
    with torch.no_grad():
        module[0].weight[1, 2] += 1e-7
    assert module_digest(module) != digest
    assert module_digest(module.double()) != module_digest(module.float())


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    barrier, computings = threading.Barrier(2, timeout=30), [Computing(), Computing()]

    def rank(number: int) -> Store:
        computing = computings[number]
        return build(tmp_path, PRINT, 11, computing, rank=number, world=2, wait=barrier.wait, shard_size=2)

    with ThreadPoolExecutor(2) as pool:
        for store in pool.map(rank, range(2)):
            assert_holds(store, range(11))
    assert [computing.asked for computing in computings] == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]]
    assert find(tmp_path, PRINT) is not None


def test_no_process_goes_on_before_all_shards_are_there(tmp_path: Path) -> None:
    """Process 1, which has nothing to do, waits twice: for the shards, and for the manifest."""
    there = []

    def wait() -> None:
        there.append((any(tmp_path.rglob("*.safetensors")), find(tmp_path, PRINT) is not None))

    build(tmp_path, PRINT, 3, Computing(), rank=0, world=2, wait=wait)
    assert there == [(True, False), (True, True)]


def test_threads_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "OPEN_SHARDS", 3)  # of 20, so that shards are opened and let go all the time
    store = build(tmp_path, PRINT, 60, Computing(), shard_size=3)
    start = threading.Barrier(8, timeout=30)

    def read(seed: int) -> None:
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed)).tolist()
        start.wait()
        for _ in range(3):
            assert_holds(store, order)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))


def test_disks_that_are_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"moments": torch.zeros(1000)}
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(39_999))
    with pytest.raises(SaveError, match=r"40000 bytes \(39\.1 KiB\) are needed and 39999 .*data\.cache_dir") as caught:
        build(tmp_path, PRINT, 10, Computing(lambda number: one), shard_size=3)
    assert str(tmp_path / PRINT[:16]) in str(caught.value) and not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(40_000))
    store = build(tmp_path, PRINT, 10, Computing(lambda number: one), shard_size=3)
    store.shard(2).unlink()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(12_000))  # enough for the shard that is missing
    build(tmp_path, PRINT, 10, Computing(lambda number: one), shard_size=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"file/.* cannot be written"):
        build(tmp_path / "file", PRINT, 10, Computing(lambda number: one))


class Encoder(nn.Module):
    """A text encoder with everything a row may hold, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 6, dtype=torch.bfloat16)
        self.dropout, self.read = nn.Dropout(0.5), 0

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, int]:
        return torch.tensor([[ord(letter) for letter in f"{caption:_<5}"[:5]] for caption in captions]), 0

    def forward(self, ids: Tensor) -> Conditioning:
        self.read += len(ids)
        context = self.dropout(self.table(ids))
        return Conditioning(context=context, mask=ids != ord("_"), pooled=context.mean(1))


def test_rows_of_captions_are_those_of_the_encoder(tmp_path: Path) -> None:
    encoder = Encoder()
    captions = ["a", "bee", "a", "see", "", "dee", "bee"]
    rows = text_rows(encoder, captions, "cpu", 2)  # type: ignore[arg-type]
    assert encoder.read == 5 and encoder.training and encoder.dropout.training
    expected = encoder.eval()(encoder.tokenize(captions)[0])
    store = build(tmp_path, PRINT, len(captions), lambda entries: [rows[number] for number in entries])
    for found in (rows, store.rows(range(len(captions)))):
        for name in ("context", "mask", "pooled"):
            stacked = torch.stack([row[name] for row in found])
            assert not stacked.requires_grad and torch.equal(stacked, getattr(expected, name))
            assert stacked.dtype == getattr(expected, name).dtype
        assert all(row.keys() == {"context", "mask", "pooled"} for row in found)
    assert text_rows(encoder, [], "cpu", 2) == []  # type: ignore[arg-type]


def test_rows_of_a_clip_encoder() -> None:
    captions = ["a red boat", "a boat", "", "words " * 30]
    tokenizer = train_tokenizer(captions, 520, 16)
    text = new_text_encoder(tokenizer, hidden_size=8, num_hidden_layers=1, num_attention_heads=2).eval()
    rows = text_rows(text, captions, "cpu", 3)
    ids, cut = text.tokenize(captions)
    with torch.no_grad():
        expected = text(ids).context
    assert cut == 1 and all(row.keys() == {"context"} for row in rows) and not text.training
    torch.testing.assert_close(torch.stack([row["context"] for row in rows]), expected)
