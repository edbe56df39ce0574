"""The text encoder beside stock CLIPTokenizer and CLIPTextModel, and a BPE written here."""

import hashlib
import itertools
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_unet.conditioning import Conditioning, TextEncoder, new_text_encoder, train_tokenizer
from diffusion_unet.errors import InputError

NOUNS = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CAPTIONS = [f"{start} {noun}" for noun in NOUNS for start in ("a photo of a", "An image showing the", "this is a")]
TEXTS = [
    "",
    "a photo of a sneaker",
    "It's  the\nANKLE boot, isn't it?",
    "Émile's café 日本語 😀",
    "x" * 50,
    "\0 \x7f \ud800",
]
LENGTH = 24


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = train_tokenizer(CAPTIONS, 600, LENGTH)
    return new_text_encoder(tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, seed=3).eval()


@pytest.fixture(scope="module")
def folder(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    encoder.save(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def stock_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """As Stable Diffusion's pipelines call it."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in GPT-2's and CLIP's vocabularies: itself where it can be printed."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# ---- the vocabulary ------------------------------------------------------------------------------------------------


def test_vocabulary_has_clips_form(encoder: TextEncoder) -> None:
    vocab = encoder.tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    letters = list(byte_letters().values())
    assert tokens[:256] == letters
    assert tokens[256:512] == [letter + "</w>" for letter in letters]
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    merges = json.loads(encoder.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert tokens[512:-2] == list(dict.fromkeys("".join(pair) for pair in merges))
    assert {"photo</w>", "sneaker</w>", "ankle</w>"} <= set(tokens) and len(tokens) <= 600
    assert sorted(vocab.values()) == list(range(len(tokens)))


def test_ids_are_those_of_plain_bpe(encoder: TextEncoder) -> None:
    vocab = encoder.tokenizer.get_vocab()
    merges = json.loads(encoder.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ranks = {tuple(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
    letters = byte_letters()

    def bpe(word: str) -> list[int]:
        parts = [letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            first, i = min(pairs, key=ranks.__getitem__), 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == first:
                    parts[i : i + 2] = ["".join(first)]
                i += 1
        return [vocab[part] for part in parts]

    pattern = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
    for text in [*CAPTIONS, "It's the ANKLE boot, isn't it? 42 photos", "snow_shoes & (sandals)... Émile"]:
        expected = [vocab["<|startoftext|>"]]
        for word in pattern.findall(text.lower()):
            expected += bpe(word)
        assert encoder.tokenizer(text)["input_ids"] == [*expected, vocab["<|endoftext|>"]]


@pytest.mark.parametrize("text", ["a photo", "émile", "日本語", "😀🏳️‍🌈", "\x00\x01", "".join(map(chr, range(0x400)))])
def test_every_string_can_be_encoded(encoder: TextEncoder, text: str) -> None:
    ids = encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    got = b"".join(bytes(bytes_of[letter] for letter in token.removesuffix("</w>")) for token in tokens).decode()
    normal = encoder.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert got.replace(" ", "") == normal.replace(" ", "")
    assert encoder.tokenizer.unk_token_id not in ids


def test_the_order_of_captions_and_the_process_change_nothing(encoder: TextEncoder) -> None:
    shuffled = CAPTIONS.copy()
    random.Random(0).shuffle(shuffled)
    for captions in (shuffled, iter(CAPTIONS[::-1])):
        again = train_tokenizer(captions, 600, LENGTH)
        assert again.backend_tokenizer.to_str() == encoder.tokenizer.backend_tokenizer.to_str()
    merges = json.loads(encoder.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    frozen = "8d573509c46cfc76f526fc14c0687ef9ba924ac35cd718a34b19e9633d76b0cc"
    assert hashlib.sha256(json.dumps(merges).encode()).hexdigest() == frozen  # of another process, some day in the past


def test_vocabulary_size_is_a_limit(encoder: TextEncoder) -> None:
    assert len(train_tokenizer(CAPTIONS, 530, LENGTH)) == 530
    assert len(train_tokenizer([], 514, LENGTH)) == 514
    assert train_tokenizer(["\ud800"], 600, LENGTH)("\0")["input_ids"]
    for size, length, match in ((513, 8, "514 or more"), (600, 2, "3 or more")):
        with pytest.raises(InputError, match=match):
            train_tokenizer(CAPTIONS, size, length)


# ---- ids and hidden states -----------------------------------------------------------------------------------------


def test_stock_classes_load_the_folders_and_agree(encoder: TextEncoder, folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model, report = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not any(report.values())
    texts = [text for text in TEXTS if "\ud800" not in text] + CAPTIONS
    ids = stock_ids(tokenizer, texts)
    ours, cut = encoder.tokenize(texts)
    assert torch.equal(ours, ids) and cut == 2 and ours.dtype == torch.int64
    with torch.no_grad():
        assert torch.allclose(encoder(ours).context, model(ids)[0], atol=1e-6)
    assert tokenizer.model_max_length == LENGTH == model.config.max_position_embeddings
    assert tokenizer.eos_token_id == model.config.eos_token_id != 2
    assert tokenizer.pad_token_id == model.config.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.bos_token_id == model.config.bos_token_id
    with torch.no_grad():
        pooled = model(ids).pooler_output
    ends = [row.tolist().index(tokenizer.eos_token_id) for row in ids]
    assert torch.allclose(pooled, ours_context(encoder, ids)[torch.arange(len(ids)), ends], atol=1e-6)


def ours_context(encoder: TextEncoder, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encoder(ids).context


def test_older_files_are_read_too(encoder: TextEncoder, copy: Path) -> None:
    """vocab.json and merges.txt alone, keys with their prefix and a constant among them, as in the releases of 2022."""
    (copy / "tokenizer" / "tokenizer.json").unlink()
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    edit(
        copy / "tokenizer" / "tokenizer_config.json", **{key: token | {"content": text} for key, text in named.items()}
    )
    (copy / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(named | {"pad_token": "<|endoftext|>"}))
    tensors = load_file(copy / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in tensors)
    tensors["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(tensors, copy / "text_encoder" / "model.safetensors")
    loaded = TextEncoder.load(copy)
    ids, cut = loaded.tokenize(TEXTS)
    assert torch.equal(ids, encoder.tokenize(TEXTS)[0]) and cut == 2
    assert torch.allclose(ours_context(loaded, ids), ours_context(encoder, ids), atol=1e-6)
    stock = CLIPTokenizer.from_pretrained(copy / "tokenizer")
    assert torch.equal(stock_ids(stock, CAPTIONS), encoder.tokenize(CAPTIONS)[0])


def test_prompts_that_do_not_fit(encoder: TextEncoder) -> None:
    fits, long = "x" * (LENGTH - 2), "x" * (LENGTH - 1)
    ids, cut = encoder.tokenize([fits, long, "a photo of a coat"])
    assert cut == 1 and torch.equal(ids[0, :-2], ids[1, :-2])
    assert ids[:2, -1].tolist() == [encoder.tokenizer.eos_token_id] * 2
    assert len(encoder.encode([fits])) == 1
    with pytest.raises(
        InputError, match=f"'{long}' takes {LENGTH + 1} tokens, the text encoder reads {LENGTH}: shorten"
    ):
        encoder.encode(["a coat", long])
    with pytest.raises(InputError) as caught:
        encoder.encode(["word\n" * 10_000])
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    assert encoder.tokenize([])[0].shape == (0, LENGTH)


def test_conditioning_of_prompts(encoder: TextEncoder) -> None:
    both = encoder.encode(["a photo of a bag", ""])
    assert both.context.shape == (2, LENGTH, 32) and encoder.width == 32
    assert both.mask is both.pooled is both.time_ids is both.class_labels is None
    assert torch.allclose(both.context[1:], encoder.encode([""]).context, atol=1e-6)
    assert torch.allclose(encoder.encode("a photo of a bag").context, both.context[:1], atol=1e-6)
    assert (both.context[0] - both.context[1]).abs().max() > 0.1
    both.context.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.zero_grad(set_to_none=True)


def test_weights_come_from_the_seed_alone(encoder: TextEncoder) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = new_text_encoder(encoder.tokenizer, seed=3, **sizes)
    assert torch.equal(torch.get_rng_state(), before)
    other = new_text_encoder(encoder.tokenizer, seed=4, **sizes)
    own = encoder.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
    key = "model.embeddings.token_embedding.weight"
    assert not torch.equal(other.state_dict()[key], own[key])
    with pytest.raises(InputError, match="multiple of num_attention_heads"):
        new_text_encoder(encoder.tokenizer, hidden_size=30, num_hidden_layers=1, num_attention_heads=4)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_half_precision_variant(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path, variant="fp16", dtype=torch.float16)
    assert next(encoder.parameters()).dtype == torch.float32
    loaded = TextEncoder.load(tmp_path, variant="fp16")
    stock = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", variant="fp16", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {p.dtype for p in stock.parameters()} == {torch.float16}
    wide = TextEncoder.load(tmp_path, variant="fp16", dtype=torch.float32)
    for name, value in encoder.state_dict().items():
        assert torch.equal(wide.state_dict()[name], value.half().float())
    with pytest.raises(InputError, match=r"model\.safetensors"):
        TextEncoder.load(tmp_path)
    with torch.no_grad():
        next(wide.parameters())[0, 0] = 1e5
    with pytest.raises(InputError, match=r"the text encoder: \S* does not fit in torch.float16"):
        wide.save(tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_loading_and_saving_print_nothing(
    encoder: TextEncoder, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    TextEncoder.load(folder).tokenize(["word " * 100])
    encoder.save(tmp_path)
    assert capfd.readouterr() == ("", "")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("text_encoder/config.json", {"architectures": ["CLIPTextModelWithProjection"]}, "a CLIPTextModel is needed"),
        ("text_encoder/config.json", {"architectures": ["os.system"]}, "a CLIPTextModel is needed"),
        ("text_encoder/config.json", {"model_type": "bert"}, "a CLIPTextModel is needed"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "another architecture"),
        ("text_encoder/config.json", {"hidden_size": 64}, "another architecture"),
        ("text_encoder/config.json", {"hidden_size": 33}, "no multiple"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("text_encoder/config.json", {"vocab_size": 10**12}, "vocab_size"),
        ("text_encoder/config.json", {"hidden_size": 0}, "hidden_size is 0, and must be a whole number from 1"),
        ("text_encoder/config.json", {"layer_norm_eps": float("nan")}, "is no JSON .*NaN"),
        ("text_encoder/config.json", {"attention_dropout": 10**400}, "is no JSON .*401 digits"),
        ("text_encoder/config.json", {"vocab_size": True}, "vocab_size is True, and must be a whole number"),
        ("text_encoder/config.json", {"hidden_size": "32"}, "hidden_size is '32', and must be a whole number"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "quick_gelu or gelu"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "Evil"}, "a CLIPTokenizer is needed"),
        ("tokenizer/tokenizer.json", {"model": {}}, "cannot be read as a CLIP tokenizer"),
    ],
)
def test_settings_that_do_not_fit(copy: Path, part: str, changes: dict[str, object], match: str) -> None:
    edit(copy / part, **changes)
    with pytest.raises(InputError, match=match) as caught:
        TextEncoder.load(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_no_code_is_taken_from_the_folder(copy: Path) -> None:
    (copy / "tokenizer" / "evil.py").write_text("raise SystemExit('executed')")
    shutil.copy(copy / "tokenizer" / "evil.py", copy / "text_encoder" / "evil.py")
    edit(copy / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    edit(copy / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.M"})
    assert len(TextEncoder.load(copy).encode(["a coat"])) == 1
    assert "evil" not in sys.modules


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer"])
def test_missing_folders(copy: Path, missing: str) -> None:
    shutil.rmtree(copy / missing)
    with pytest.raises(InputError, match=str(copy / missing)):
        TextEncoder.load(copy)


def test_truncated_and_foreign_weights(copy: Path, encoder: TextEncoder) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    whole = path.read_bytes()
    for part in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            TextEncoder.load(copy)
    path.write_bytes(whole)
    larger = train_tokenizer([*CAPTIONS, "entirely other words, quite many of them"], 700, LENGTH)
    with pytest.raises(InputError, match="take both from the same model"):
        TextEncoder(larger, encoder.model)


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_conditioning() -> None:
    whole = Conditioning(
        context=torch.randn(3, 4, 5),
        mask=torch.rand(3, 4) > 0.5,
        time_ids=torch.full((3, 6), 1025),
        class_labels=torch.arange(3),
    )
    assert len(whole) == 3 and len(Conditioning()) == 0
    rows = whole[[2, 0, 0]]
    assert torch.equal(rows.context, whole.context[[2, 0, 0]]) and rows.class_labels.tolist() == [2, 0, 0]
    assert rows.pooled is None
    joined = Conditioning.cat([whole[:1], whole[1:]])
    for name in ("context", "mask", "time_ids", "class_labels"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    with pytest.raises(ValueError, match="different fields"):
        Conditioning.cat([whole, Conditioning(context=whole.context)])
    half = whole.to(dtype=torch.bfloat16)
    assert half.context.dtype == torch.bfloat16 and half.mask.dtype == torch.bool
    assert half.time_ids.tolist() == whole.time_ids.tolist() and half.class_labels.dtype == torch.int64
    assert whole.to("cpu", torch.float32).context is whole.context


def test_what_a_tokenizer_was_last_asked_is_no_part_of_it(tmp_path: Path) -> None:
    encoder = new_text_encoder(
        train_tokenizer(["a red boat"], 520, 8), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    before, fingerprint = encoder.vocabulary(), encoder.fingerprint()
    encoder.tokenizer(["a boat", "red"], padding="max_length", truncation=True, max_length=5)
    assert encoder.tokenizer.backend_tokenizer.padding is not None
    assert encoder.vocabulary() == before and encoder.fingerprint() == fingerprint
    encoder.save(tmp_path)
    assert (tmp_path / "tokenizer/tokenizer.json").read_bytes() == before
