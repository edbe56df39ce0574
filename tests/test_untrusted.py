"""Files from strangers: every lie of a safetensors header, and JSON that is none or too much, is one line."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusion_unet.checkpoint import read_safetensors
from diffusion_unet.errors import InputError
from diffusion_unet.info import describe
from diffusion_unet.untrusted import MAX_HEADER_BYTES, Entry, parse_object, read_header, read_json

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def refused(match: str, read: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(InputError, match=match) as caught:
        read(*arguments)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    return text


# --- headers


def packed(header: dict[str, Any] | str, data: bytes = b"", length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_a_header_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.zeros(0, 5, dtype=torch.bfloat16),
        "c": torch.tensor(7),
        "d": torch.randn(5).to(torch.float8_e4m3fn),
        "e": torch.ones(2, 2, dtype=torch.complex64),
        "f": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "said": "line\nline"})
    header = read_header(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in tensors}
        assert header.tensors == {k: Entry(s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
        assert header.metadata == file.metadata()
    assert {key: value.dtype for key, value in read_safetensors(tmp_path / "a.safetensors").items()} == {
        key: value.dtype for key, value in tensors.items()
    }


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": F32 | changes}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cut short: 0 bytes"),
        (b"\x01\0\0", "cut short: 3 bytes"),
        (packed({}, length=2**63), "cut short"),
        (packed({}, length=2**64 - 1), "cut short"),
        (packed("[]"), "no JSON object"),
        (packed(" {}"), "no JSON object"),
        (packed("{"), "damaged, or no safetensors file"),
        (packed('{"a":' * 5000 + "1" + "}" * 5000), "damaged, or no safetensors"),
        (packed('{"a": 1e999}'), "not finite"),
        (packed('{"a": ' + "1" * 10000 + "}"), "whole number of 10000 digits"),
        (packed(b"{\xff}".decode("latin-1")), "damaged, or no safetensors"),
        (packed('{"a": %s, "a": %s}' % ((json.dumps(F32),) * 2), bytes(24)), "the key 'a' is there twice"),
        (packed({"a": 3}), "'a' needs dtype, shape and data_offsets"),
        (packed({"a": {**F32, "more": 1}}, bytes(24)), "'a' needs dtype"),
        (packed({"a": {"dtype": "F32", "shape": [6]}}, bytes(24)), "'a' needs dtype"),
        (packed({"__metadata__": {"a": 1}}), "__metadata__ is more than texts"),
        (packed({"a\nb": F32}, bytes(24)), r"'a\\nb' is no name"),
        (packed({"a" * 600: F32}, bytes(24)), "is no name"),
        (packed(entry(dtype="F31"), bytes(24)), "of the type 'F31'"),
        (packed(entry(dtype=[]), bytes(24)), "of the type"),
        (packed(entry(shape=[-2, -3]), bytes(24)), "of the shape"),
        (packed(entry(shape=[True, 6]), bytes(24)), "of the shape"),
        (packed(entry(shape=[2.0, 3]), bytes(24)), "of the shape"),
        (packed(entry(shape="23"), bytes(24)), "of the shape"),
        (packed(entry(shape=[2**31, 2**31, 2**31]), bytes(24)), "of the shape"),
        (packed(entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])), "of the shape"),
        (packed(entry(shape=[1] * 99), bytes(24)), "of the shape"),
        (packed(entry(shape=[2, 4]), bytes(24)), r"is F32 \[2, 4\], and its data_offsets are \[0, 24\]"),
        (packed(entry(data_offsets=[24, 0]), bytes(24)), "data_offsets"),
        (packed(entry(data_offsets=[-24, 0]), bytes(24)), "data_offsets"),
        (packed(entry(data_offsets=[0, 24, 48]), bytes(24)), "data_offsets"),
        (packed(entry(data_offsets=[8, 32]), bytes(32)), "has a gap before it"),
        (packed({"a": F32, "b": F32}, bytes(24)), "overlaps another"),
        (packed({"a": F32, "b": F32 | {"data_offsets": [20, 44]}}, bytes(44)), "overlaps another"),
        (packed({"a": F32}, bytes(25)), "take 24 bytes, and it holds 25"),
        (packed({"a": F32}, bytes(23)), "take 24 bytes, and it holds 23"),
        (packed(entry(shape=[2**40], data_offsets=[0, 2**42]), bytes(24)), "take 4398046511104 bytes"),
    ],
)
def test_headers_that_lie(data: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    for read in (read_header, read_safetensors, describe):
        assert str(tmp_path / "a.safetensors") in refused(match, read, tmp_path / "a.safetensors")


def test_a_header_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)
    refused("its header is over", read_header, tmp_path / "a.safetensors")


def test_a_pipe_is_not_waited_on(tmp_path: Path) -> None:
    for name, read in (("a.safetensors", read_header), ("config.json", read_json)):
        os.mkfifo(tmp_path / name)
        refused("is no file", read, tmp_path / name)


# --- JSON


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"a": NaN}', "'NaN' is not finite"),
        (b'{"a": -Infinity}', "'-Infinity' is not finite"),
        (b'{"a": 1e999}', "'1e999' is not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a whole number of 5000 digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "over 64 levels deep"),
        (b'{"a": ' + b"[" * 100000, "is no JSON"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b'{"a": "\xed\xa0\x80"}', "is no JSON"),
        (b'{"a": [' + b"0," * (1 << 19) + b"0]}", "over 524288 values"),
        (b'\xff\xfe{\0"\0a\0"\0:\x001\0}\0', "is no JSON"),
        (b"[1]", "holds a list"),
        (b"", "is no JSON"),
    ],
)
def test_json_that_is_none_or_too_much(text: bytes, match: str) -> None:
    refused(f"^config.json: .*{match}", parse_object, text, "config.json")


def test_json_that_real_files_hold() -> None:
    text = b'\xef\xbb\xbf{"model_max_length": 1000000000000000019884624838656, "a": "\\ud83d\\ude00", "b": [1e-5]}'
    assert parse_object(text, "x") == {"model_max_length": 10**30 + 19884624838656, "a": "\U0001f600", "b": [1e-5]}


def test_configs_over_1_mb(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": "x" * (1 << 20)}))
    refused("over 1048576 bytes", read_json, tmp_path / "config.json")
