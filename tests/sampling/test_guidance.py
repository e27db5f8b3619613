"""Guidance: its formula, that 1 is off, what compiles, and what is refused."""

import jax
import numpy as np
import pytest
from sampling_helpers import BATCH, same

from mindalle_jax import Dalle
from mindalle_jax.errors import UsageError


def test_guidance_1_is_off(tiny_dalle, plain):
    """Bit for bit, and no second row is computed."""
    same(
        tiny_dalle.generate(
            "the cat", num_candidates=6, batch_size=BATCH, seed=1, ranker="likelihood", guidance_scale=1.0
        ),
        plain,
    )


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_follows_its_formula(tiny_dalle, scale):
    """Greedy, code by code: the most likely one under u + scale (c - u), by the forward pass without a cache."""
    drawn = tiny_dalle.generate_codes(
        "the cat", num_candidates=2, batch_size=BATCH, temperature=0, guidance_scale=scale
    )
    np.testing.assert_array_equal(drawn[0], drawn[1])
    with_text, _ = tiny_dalle.logits(tiny_dalle.tokenize("the cat"), drawn[:1])
    without, _ = tiny_dalle.logits(tiny_dalle.tokenize(""), drawn[:1])
    guided = np.asarray(without + scale * (with_text - without))[0]
    best_two = np.sort(guided, axis=-1)[:, -2:]
    assert (best_two[:, 1] - best_two[:, 0] > 1e-4).all()  # no near tie that rounding could decide
    np.testing.assert_array_equal(drawn[0], guided.argmax(axis=-1))


def test_guidance_0_draws_what_a_blank_prompt_draws(tiny_dalle):
    """The noise is that of the candidate, so even the draws agree."""
    options = {"num_candidates": 3, "batch_size": BATCH, "seed": 4}
    np.testing.assert_array_equal(
        tiny_dalle.generate_codes("the cat", guidance_scale=0.0, **options),
        tiny_dalle.generate_codes("", allow_empty=True, **options),
    )


def test_guidance_compiles_once(tiny_dalle, compilations):
    """A slider: scales other than 1 share a program."""
    options = {"num_candidates": 3, "batch_size": BATCH}
    tiny_dalle.generate_codes("the cat", guidance_scale=2.0, **options)
    before = len(compilations)
    for scale in (0, 0.25, 3.0, 100.0):
        tiny_dalle.generate_codes("dog", guidance_scale=scale, **options)
    assert len(compilations) == before


def test_guidance_on_eight_devices(tiny_model_folder, tiny_dalle):
    """Both rows of a candidate lie on its device."""
    eight = Dalle.from_pretrained(tiny_model_folder, mesh=jax.sharding.Mesh(np.array(jax.devices()), ("data",)))
    options = {"num_candidates": 9, "batch_size": BATCH, "guidance_scale": 2.0, "ranker": "likelihood"}
    one, many = tiny_dalle.generate("the cat", **options), eight.generate("the cat", **options)
    np.testing.assert_array_equal(one.codes, many.codes)
    np.testing.assert_array_equal(one.scores, many.scores)


@pytest.mark.parametrize("scale", [-1, -0.001, float("nan"), float("inf"), True, "2", None])
def test_guidance_out_of_range(tiny_dalle, scale):
    with pytest.raises(UsageError, match="guidance_scale must be a finite number >= 0, 1 for off; not"):
        tiny_dalle.generate("the cat", guidance_scale=scale)


def test_guidance_needs_a_text(igpt):
    with pytest.raises(UsageError, match="guidance_scale is for text-to-image models"):
        igpt.generate(0, guidance_scale=2.0)
