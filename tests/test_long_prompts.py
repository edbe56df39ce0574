"""Prompts of more tokens than the encoder reads: each chunk is what transformers and diffusers make of its text."""

import copy
import functools
from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from torch import Tensor

from diffusion_unet.conditioning import Conditioning, TextEncoder, new_text_encoder, train_tokenizer
from diffusion_unet.errors import InputError
from diffusion_unet.prompts import ClassLabels, DualTextEncoder

# Every letter is a token of the tiny tokenizer's, and a chunk holds ten.
CHUNK = tiny.LENGTH - 2
PARTS = ["red boot abc", "blue bag de f", "grey"]
TWO, THREE = " ".join(PARTS[:2]), " ".join(PARTS)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(tiny.tokenizer(), tiny.text_encoder())


@pytest.fixture(scope="module")
def dual() -> DualTextEncoder:
    first = TextEncoder(tiny.tokenizer(), tiny.text_encoder(tiny.CONTEXT_WIDTH - tiny.POOLED_WIDTH))
    return DualTextEncoder(first, TextEncoder(second_tokenizer(), tiny.text_encoder(*(tiny.POOLED_WIDTH,) * 2)))


def second_tokenizer() -> Any:
    """It fills up with another token, as SDXL's second."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.pad_token = "!"
    return tokenizer


def stock_ids(texts: list[str]) -> Tensor:
    tokens = tiny.tokenizer()(texts, padding="max_length", truncation=True, max_length=tiny.LENGTH, return_tensors="pt")
    ids: Tensor = tokens.input_ids
    return ids


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# ---- one encoder ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_chunks_are_encoded_each_by_itself_and_laid_end_to_end(encoder: TextEncoder) -> None:
    said = [tiny.text_encoder()(stock_ids([part]))[0] for part in (*PARTS, "")]  # [1, L, D] each
    together = encoder.encode([THREE, TWO, "", PARTS[1]], chunks=3)
    assert together.context is not None and together.context.shape == (4, 3 * tiny.LENGTH, tiny.CONTEXT_WIDTH)
    for row, parts in enumerate([(0, 1, 2), (0, 1, 3), (3, 3, 3), (1, 3, 3)]):
        close(together.context[row], torch.cat([said[part][0] for part in parts]))
    close(encoder.encode([TWO], chunks=2).context, torch.cat(said[:2], dim=1))
    assert (said[0] - said[1]).abs().max() > 0.1 and (said[0] - said[3]).abs().max() > 0.1
    assert together.mask is together.pooled is None


@torch.no_grad()
def test_a_prompt_that_fits_is_what_it_was(encoder: TextEncoder) -> None:
    texts = [tiny.PROMPT, "", PARTS[0]]
    ids, cut = encoder.tokenize(texts)
    assert torch.equal(ids, stock_ids(texts)) and cut == 0
    for said in (encoder.encode(texts), encoder.encode(texts, chunks=1)):
        assert said.context is not None and torch.equal(said.context, tiny.text_encoder()(ids)[0])
    ids, cut = encoder.tokenize([THREE, tiny.PROMPT, TWO])  # as training has it
    assert torch.equal(ids, stock_ids([THREE, tiny.PROMPT, TWO])) and cut == 2


def test_how_many_chunks_a_pair_takes(encoder: TextEncoder) -> None:
    counts = {"": 1, "x": 1, "x" * CHUNK: 1, "x" * (CHUNK + 1): 2, "x " * 2 * CHUNK: 2, TWO: 2, THREE: 3, "\ud800": 1}
    assert {text: encoder.chunks(text) for text in counts} == counts
    assert encoder.chunks("", THREE) == encoder.chunks(THREE, TWO) == 3 and encoder.chunks(TWO, "") == 2
    most = "x" * 32 * CHUNK
    assert encoder.chunks(most) == 32
    with pytest.raises(InputError, match="takes 323 tokens: at most 322 are read, in 32 chunks") as caught:
        encoder.chunks("a", most + "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    with pytest.raises(InputError, match=f"takes {2 * CHUNK + 6} tokens, the text encoder reads {2 * CHUNK + 2}"):
        encoder.encode([tiny.PROMPT, THREE], chunks=2)


def test_the_parts_of_a_conditioning() -> None:
    given = Conditioning(
        context=torch.arange(24.0).reshape(4, 3, 2),
        mask=torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool(),
        pooled=torch.arange(4.0)[:, None],
        time_ids=torch.arange(24.0).reshape(4, 6),
        class_labels=torch.arange(4),
    )
    made = given.end_to_end(2)
    assert len(made) == 2 and made.context is not None and made.mask is not None and made.pooled is not None
    assert torch.equal(made.context, torch.arange(24.0).reshape(2, 6, 2))
    assert made.mask.long().tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert made.pooled.tolist() == [[0], [2]] and made.time_ids[:, 0].tolist() == [0, 12]  # type: ignore[index]
    assert made.class_labels.tolist() == [0, 2] and made.extra is None  # type: ignore[union-attr]


# ---- two encoders --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sdxl_reads_chunks_with_both(dual: DualTextEncoder) -> None:
    settings = {key: value for key, value in tiny.XL.items() if not key.startswith("_")}
    pipe = tiny.xl("StableDiffusionXLPipeline").assemble(
        tiny.seeded(functools.partial(diffusers.UNet2DConditionModel, **settings))
    )
    pipe.tokenizer_2 = second_tokenizer()
    said = [pipe.encode_prompt(part, device="cpu", do_classifier_free_guidance=False) for part in PARTS]
    made = dual.encode([THREE, "", TWO], chunks=3)
    assert made.context is not None and made.pooled is not None
    close(made.context[0], torch.cat([context[0] for context, *_ in said]))
    close(made.context[2, : 2 * tiny.LENGTH], torch.cat([context[0] for context, *_ in said[:2]]))
    close(made.pooled[[0, 2]], said[0][2].expand(2, -1))
    # The empty prompt of SDXL is all zeros, and so is what fills up.
    assert not made.context[1].any() and not made.pooled[1].any() and not made.context[2, 2 * tiny.LENGTH :].any()
    assert dual.chunks(THREE, "") == 3 and dual.chunks(PARTS[0], "") == 1
    one = dual.encode([PARTS[0], ""])
    assert one.context is not None and torch.equal(one.context, dual(dual.tokenize([PARTS[0], ""])[0]).context)


@torch.no_grad()
def test_the_longer_of_two_readings_counts(dual: DualTextEncoder) -> None:
    words = train_tokenizer([TWO] * 3, 560, tiny.LENGTH)
    first = new_text_encoder(words, hidden_size=8, num_hidden_layers=2, num_attention_heads=2).eval()
    both = DualTextEncoder(first, dual.second, zeros_for_empty=False)
    assert (first.chunks(TWO), dual.second.chunks(TWO), both.chunks(TWO)) == (1, 2, 2)
    context, empty = (both.encode([text], chunks=2).context for text in (TWO, ""))
    assert context is not None and empty is not None and context.shape == (1, 2 * tiny.LENGTH, 8 + tiny.POOLED_WIDTH)
    close(context[:, tiny.LENGTH :, :8], empty[:, : tiny.LENGTH, :8])
    assert (context - empty)[:, tiny.LENGTH :, 8:].abs().max() > 0.1


# ---- classes -------------------------------------------------------------------------------------------------------


def test_a_class_is_one_chunk() -> None:
    classes = ClassLabels(["boot", "bag"])
    assert classes.chunks("bag", "") == 1
    for chunks in (1, 2):
        made = classes.encode(["bag", ""], chunks=chunks)
        assert made.class_labels is not None and made.class_labels.tolist() == [1, 2] and made.context is None
    with pytest.raises(InputError, match="'bags' is none of the 2 classes"):
        classes.chunks("bags", "")
