"""Sizes of the tiny model, and what the tests of sampling make and compare."""

import dataclasses

import numpy as np

from mindalle_jax.config.schema import Config
from mindalle_jax.sampling.options import SamplingOptions

BATCH = 4  # one compiled size for all tests
WIDTH, LENGTH, SIDE = 8, 64, 32  # codes in a row, in an image; pixels


def config_of(vocab_size: int) -> Config:
    """A configuration with so many codes."""
    return dataclasses.replace(Config(), stage2=dataclasses.replace(Config().stage2, vocab_size_img=vocab_size))


def settings_of(vocab_size=80, **settings) -> SamplingOptions:
    """Checked options, top-k off where it is not given."""
    return SamplingOptions.of(**{"top_k": None} | settings).check(config_of(vocab_size))


def log_probs(logits) -> np.ndarray:
    """In float64."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def chosen(model, text_ids, codes) -> np.ndarray:
    """log p of each code [b, t] after one text, by the forward pass."""
    logits, _ = model.logits(np.repeat(text_ids, len(codes), axis=0), codes)
    return np.take_along_axis(log_probs(logits), codes[..., None], axis=-1)[..., 0]


def same(a, b) -> None:
    """Two Generations bit by bit, times and places aside."""
    for name in ("images", "codes", "scores", "seeds"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.prompts == b.prompts and a.meta == b.meta
