"""text/clip_tokenizer.py: rows of ids of one length. What its files may hold: interop/test_clip.py."""

import dataclasses

import numpy as np
import pytest

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.clip import read_clip
from mindalle_jax.text.clip_tokenizer import clip_ids, read_clip_tokenizer


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
