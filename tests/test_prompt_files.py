"""Files of prompts: what is read, line for line, and the one line that a file is refused with."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_unet import prompt_files
from diffusion_unet.errors import InputError
from diffusion_unet.prompt_files import DRAWN, SCORED, read_prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_file_has_a_prompt_a_line(end: str, mark: str, tmp_path: Path) -> None:
    lines = ["a coat", "", "# a remark", "  a bag # and a hat", " \t", '{"prompt": "a boot"}', "Stiefel für 日本 😀"]
    expected = [{"prompt": lines[row]} for row in (0, 3, 5, 6)]
    for name, last in (("a.txt", ""), ("b.TXT", end)):
        path = write(tmp_path / name, mark + end.join(lines) + last)
        assert read_prompts(path, DRAWN) == read_prompts(path, {}) == expected


def test_a_line_of_json_has_settings_of_its_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a coat"},
        {"prompt": "# one\nand\u2028two\u0085", "negative_prompt": "grey", "seed": 2**64 - 1},
        {"prompt": "", "seed": 0, "negative_prompt": ""},
    ]
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        assert read_prompts(write(tmp_path / "a.jsonl", "\n\n".join(lines) + "\n"), DRAWN) == rows
    path = write(tmp_path / "b.jsonl", '{"prompt": "a", "negative_prompt": null, "seed": null}')
    assert read_prompts(path, DRAWN) == [{"prompt": "a"}]
    path = write(tmp_path / "c.jsonl", '{"label": 4, "prompt": "a coat"}\n{"prompt": "a bag"}')
    assert read_prompts(path, SCORED) == [{"prompt": "a coat", "label": 4}, {"prompt": "a bag"}]


# ---- what is refused -----------------------------------------------------------------------------------------------

FIRST = b'{"prompt": "a"}\n\n'  # a good line, and an empty one
BAD_LINES = {
    "no JSON": (b"a coat", "line 3: is no JSON"),
    "half": (b'{"prompt": "a"', "line 3: is no JSON"),
    "remark": (b"# a remark", "line 3: is no JSON"),
    "list": (b'["a"]', "line 3: holds a list"),
    "text": (b'"a"', "line 3: holds a str"),
    "deep": (b"[" * 100_000, "line 3: is no JSON"),
    "twice": (b'{"prompt": "a", "prompt": "b"}', "line 3: is no JSON .*'prompt' is there twice"),
    "nothing": (b"{}", 'line 3: has no "prompt"'),
    "null": (b'{"prompt": null}', 'line 3: has no "prompt"'),
    "number": (b'{"prompt": 3}', "line 3: prompt is 3, and must be a text"),
    "unknown": (b'{"prompt": "a", "promt": "b"}', "line 3: 'promt' is not known here: prompt, negative_prompt, seed"),
    "label": (b'{"prompt": "a", "label": 3}', "line 3: 'label' is not known here"),
    "negative": (b'{"prompt": "a", "negative_prompt": ["b"]}', "line 3: negative_prompt is .*, and must be a text"),
    "seed text": (b'{"prompt": "a", "seed": "3"}', "line 3: seed is '3', and must be a whole number"),
    "seed bool": (b'{"prompt": "a", "seed": true}', "line 3: seed is True"),
    "seed float": (b'{"prompt": "a", "seed": 3.0}', "line 3: seed is 3.0"),
    "seed below": (b'{"prompt": "a", "seed": -1}', "line 3: seed is -1"),
    "seed above": (b'{"prompt": "a", "seed": 18446744073709551616}', "line 3: seed is 18446744073709551616"),
    "seed NaN": (b'{"prompt": "a", "seed": NaN}', "line 3: is no JSON"),
    "surrogate": (rb'{"prompt": "a \ud800"}', "line 3: is no JSON"),
    "NUL": (rb'{"prompt": "a \u0000"}', "line 3: holds a NUL"),
    "NUL beside": (rb'{"prompt": "a", "negative_prompt": "\u0000"}', "line 3: holds a NUL"),
    "Latin-1": ('{"prompt": "für"}'.encode("latin-1"), "line 3: is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_cannot_be_is_named(name: str, tmp_path: Path) -> None:
    content, message = BAD_LINES[name]
    refused(write(tmp_path / "a.jsonl", FIRST + content + b"\n" + FIRST), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt: holds no prompt"),
        (b"\n# only remarks\n  \n", "a.txt: holds no prompt"),
        (b"a\nb\0c\n", "line 2: holds a NUL"),
        (b"a\n\nf\xfcr", "line 3: is not UTF-8"),
        ("a coat\n".encode("utf-16"), "line 1: is not UTF-8"),
        ("a coat\n".encode("utf-16-le"), "line 1: holds a NUL"),
    ],
)
def test_text_that_cannot_be_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.txt", content), message)


def test_files_that_cannot_be_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none.txt", "none.txt: cannot be read .No such file")
    (tmp_path / "folder.txt").mkdir()
    refused(tmp_path / "folder.txt", "folder.txt: is no file")
    for name in ("prompts", "prompts.json", "prompts.csv"):
        refused(write(tmp_path / name, "a coat"), f"{name}: prompts are read from a .txt file")
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate((32 << 20) + 1)
    refused(tmp_path / "large.txt", r"large.txt: over 33554432 bytes .32.0 MiB.")
    monkeypatch.setattr(prompt_files, "MAX_PROMPTS", 2)
    assert len(read_prompts(write(tmp_path / "a.txt", "a\nb\n"), DRAWN)) == 2
    refused(write(tmp_path / "a.txt", "a\nb\n\nc"), "line 4: over 2 prompts")


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path, DRAWN)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path)) and len(str(caught.value)) < 400
