"""Words learned for a text encoder, and further input channels, beside diffusers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import inputs
from safetensors.torch import load_file
from tiny_adapters import (
    RGB,
    assert_same,
    core,
    shaken,
    stock_pipeline,
    stock_xl_pipeline,
    tiny,
    tiny_xl,
    trained,
)
from tiny_pipelines import CONTEXT_WIDTH, LENGTH, tokenizer
from torch import Tensor

from diffusion_unet.errors import InputError
from training.adapters import EMBEDDING_FILE, add_tokens, save_embedding, widen_conv_in
from training.config import TextualInversionConfig

TOY = TextualInversionConfig(placeholder_token="<toy>", initializer_token="a", num_vectors=3)
TOYS = ["a red <toy>", "<toy>", "a red boot", "<TOY>, a bag"]


def stock_words(pipe: Any, captions: list[str]) -> Tensor:
    hidden: Tensor = pipe.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)[0]
    return hidden.detach()


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_stock_pipeline_reads_a_learned_word_as_it_was_trained(vectors: int, tmp_path: Path) -> None:
    model, pipe = tiny(), stock_pipeline()
    text = model.text
    assert text is not None
    plain = text.encode(["a red boot"]).context
    start = text.model.get_input_embeddings().weight[text.tokenizer("a", add_special_tokens=False).input_ids[0]].clone()
    add_tokens(model, TextualInversionConfig("<toy>", "a", vectors))
    (parameter,) = trained(model.unet, text).values()
    assert torch.equal(parameter, start.expand(vectors, -1))
    assert torch.equal(text.encode(["a red boot"]).context, plain)  # type: ignore[arg-type]
    shaken(text, by=1.0)
    path = save_embedding(model, tmp_path)
    assert path.name == EMBEDDING_FILE
    assert {key: value.shape for key, value in load_file(path).items()} == {"<toy>": (vectors, CONTEXT_WIDTH)}
    pipe.load_textual_inversion(tmp_path)
    learned = text.encode(TOYS[:3]).context
    assert learned is not None
    assert_same(learned, stock_words(pipe, TOYS[:3]))
    assert not torch.allclose(learned[0], learned[2], atol=1e-2)


def test_only_the_new_rows_get_a_gradient_and_from_captions_that_hold_the_word() -> None:
    model = tiny()
    text = model.text
    assert text is not None
    add_tokens(model, TOY)
    ids, cut = text.tokenize(TOYS)
    first = len(tokenizer())
    assert cut == 0
    assert [[i for i in row if i >= first] for row in ids.tolist()] == [[first, first + 1, first + 2]] * 2 + [
        [],
        [first, first + 1, first + 2],
    ]
    (parameter,) = trained(text).values()
    text(ids[2:3]).context.square().sum().backward()
    assert parameter.grad is not None and not parameter.grad.any()
    text(ids[:1]).context.square().sum().backward()
    assert parameter.grad.abs().amax(dim=1).min() > 0
    assert all(other.grad is None for other in text.parameters() if other is not parameter)


def test_a_caption_that_the_word_makes_too_long_is_cut_to_fit() -> None:
    model = tiny()
    assert model.text is not None
    add_tokens(model, TextualInversionConfig("<toy>", "a", LENGTH))
    ids, cut = model.text.tokenize(["<toy>"])
    assert (ids.shape, cut, ids[0, -1]) == ((1, LENGTH), 1, model.text.tokenizer.eos_token_id)
    with pytest.raises(InputError, match="shorten it"):
        model.text.encode(["<toy>"])


def test_sdxl_learns_the_word_in_both_encoders(tmp_path: Path) -> None:
    model, pipe = tiny_xl(), stock_xl_pipeline()
    add_tokens(model, TOY)
    shaken(model.text, by=1.0)
    saved = load_file(save_embedding(model, tmp_path))
    assert {key: value.shape for key, value in saved.items()} == {"clip_l": (3, 8), "clip_g": (3, 16)}
    second = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
    pipe.load_textual_inversion({"<toy>": saved["clip_l"]})
    pipe.load_textual_inversion({"<toy>": saved["clip_g"]}, **second)
    for name, words, ours in (
        ("text_encoder", pipe.tokenizer, model.text.first),
        ("text_encoder_2", pipe.tokenizer_2, model.text.second),
    ):
        prompts = pipe.maybe_convert_prompt(TOYS[:3], words)
        ids = words(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        assert torch.equal(ids, ours.tokenize(TOYS[:3])[0])
        assert_same(getattr(pipe, name)(ids).last_hidden_state, ours.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TextualInversionConfig("<toy>", "zebra"), "'zebra' is 5 tokens of the text_encoder; take a word that is one"),
        (TextualInversionConfig("<toy>", ""), "is 0 tokens"),
        (TextualInversionConfig("a", "a"), "'a' is a token of the text_encoder already"),
        (TextualInversionConfig("<|endoftext|>", "a"), "is a token of the text_encoder already"),
        (TextualInversionConfig("my toy", "a"), "must be one word"),
    ],
)
def test_a_word_that_cannot_be_learned_changes_nothing(
    config: TextualInversionConfig, message: str, tmp_path: Path
) -> None:
    model = tiny()
    assert model.text is not None
    with pytest.raises(InputError, match=message):
        add_tokens(model, config)
    assert len(model.text.tokenizer) == len(tokenizer())
    with pytest.raises(InputError, match="no placeholder to save"):
        save_embedding(model, tmp_path)


def test_a_word_is_learned_once_only() -> None:
    model = tiny()
    add_tokens(model, TOY)
    with pytest.raises(InputError, match="'<toy>' is a token"):
        add_tokens(model, TOY)


def test_without_a_text_encoder_there_is_no_word_to_learn() -> None:
    model = tiny()
    model.text = None
    with pytest.raises(InputError, match="no text encoder"):
        add_tokens(model, TOY)


def test_more_channels_change_nothing_until_they_are_trained() -> None:
    unet = core(RGB)
    wide = widen_conv_in(unet, 8)
    values = inputs(RGB, mask=False)
    more = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_same(wide(**{**values, "x": torch.cat([values["x"], more], dim=1)}), unet(**values))
    assert wide.config.in_channels == 8 and not wide.training
    own, shared = wide.state_dict(), unet.state_dict()
    assert own["conv_in.weight"].shape == (16, 8, 3, 3)
    assert all(own[key].data_ptr() == shared[key].data_ptr() for key in shared if key != "conv_in.weight")


def test_fewer_channels_are_refused() -> None:
    with pytest.raises(InputError, match="takes 3 channels already, and 2"):
        widen_conv_in(core(RGB), 2)
