"""text/clip_tokenizer.py: rows of ids of one length. What its files may hold: interop/test_clip.py."""

import dataclasses
import html
import json
import random
from pathlib import Path

import ftfy
import numpy as np
import pytest
from commands import python

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.clip import read_clip
from mindalle_jax.text.clip_tokenizer import (
    END,
    START,
    byte_tokens,
    clean_text,
    clip_ids,
    make_clip_tokenizer,
    read_clip_tokenizer,
)


@pytest.fixture(scope="module")
def model(tiny_clip_folder):
    return read_clip(tiny_clip_folder)


def test_rows_start_and_end_with_their_tokens(model):
    start, end = model.tokenizer.encode("").ids
    prompts = ["", "a", "the cat " * 50]
    tokenized = clip_ids(model.tokenizer, prompts, 9)
    assert tokenized.ids.shape == (3, 9) and tokenized.ids.dtype == np.int32
    assert tokenized.ids[0].tolist() == [start] + [end] * 8
    assert (tokenized.ids[:, 0] == start).all() and (tokenized.ids[:, -1] == end).all()
    assert tokenized.num_tokens == [len(model.tokenizer.encode(prompt).ids) for prompt in prompts]
    np.testing.assert_array_equal(tokenized.ids[2, :8], model.tokenizer.encode(prompts[2]).ids[:8])


def test_a_tokenizer_of_another_model_is_refused(model, tiny_clip_folder, tmp_path):
    fewer = dataclasses.replace(model.config.text, vocab_size=10, eos_token_id=9)
    with pytest.raises(CheckpointError, match="the token embedding has 10 rows; it belongs to another model"):
        read_clip_tokenizer(tiny_clip_folder, fewer)
    other = dataclasses.replace(model.config.text, eos_token_id=5)
    with pytest.raises(CheckpointError, match="but the network looks for 5"):
        read_clip_tokenizer(tiny_clip_folder, other)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        read_clip_tokenizer(tmp_path, model.config.text)


# Texts are cleaned as openai/CLIP cleans them

RECORDED = json.loads(Path(__file__).with_name("openai_clip_ids.json").read_text(encoding="utf-8"))
START_ID, END_ID = 49_406, 49_407


@pytest.fixture(scope="module")
def openai():
    """OpenAI's tokenizer with the merges that the recorded texts need; tokens have their ids of the full vocabulary."""
    merges = [tuple(line.split(" ")) for line in RECORDED["merges"]]
    vocab = {token: i for i, token in enumerate(byte_tokens())}
    vocab |= {"".join(pair): i for pair, i in zip(merges, RECORDED["merged_ids"], strict=True)}
    return make_clip_tokenizer(vocab | {START: START_ID, END: END_ID}, merges)


@pytest.mark.parametrize("kind", RECORDED["texts"])
def test_ids_are_those_of_openais_tokenizer(openai, kind):
    """Curly quotes, entities and full-width letters had other ids, and so another order of the images."""
    for text, ids in RECORDED["texts"][kind]:
        row = clip_ids(openai, [text], 77).ids[0].tolist()
        assert row == [START_ID, *ids, END_ID] + [END_ID] * (75 - len(ids)), text


def test_the_recorded_texts_need_the_cleaning(openai):
    """Else the test above could not fail."""
    for kind in ("curly quotes", "entities", "entities, twice", "full-width", "ligatures", "wrong encoding"):
        assert any(openai.encode(text).ids[1:-1] != ids for text, ids in RECORDED["texts"][kind]), kind


def test_plain_text_is_cleaned_without_ftfy():
    """It takes a tenth of a second to import; what is skipped is what ftfy would leave as it is."""
    characters = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    rng = random.Random(0)
    for _ in range(3_000):
        text = "".join(rng.choices(characters, k=rng.randrange(30)))
        assert html.unescape(html.unescape(ftfy.fix_text(text))) == text
        assert clean_text(text) == " ".join(text.split()).lower()
    code = "import sys, mindalle_jax.text.clip_tokenizer as c; c.clean_text('A red bus'); print('ftfy' in sys.modules)"
    assert python("-c", code).stdout == "False\n"
