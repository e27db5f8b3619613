"""Streams, callbacks and stopping: what is seen on the way is a part of the result."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from sampling_helpers import BATCH, LENGTH, WIDTH, same

from mindalle_jax.errors import UsageError


@pytest.mark.parametrize("every", [8, 16, 32, None])
def test_a_stream_ends_in_what_generate_gives(tiny_dalle, plain, every):
    """And on the way shows as many previews as there are stops, chunk by chunk."""
    seen = list(
        tiny_dalle.stream("the cat", every=every, num_candidates=6, batch_size=BATCH, seed=1, ranker="likelihood")
    )
    same(seen[-1], plain)
    assert len(seen) == (1 if every is None else 2 * LENGTH // every)
    for at, preview in enumerate(seen[:-1]):
        drawn = (preview.codes >= 0).sum(axis=-1)
        done = every * (at + 1)
        expected = [min(done, LENGTH)] * 4 + [max(0, done - LENGTH)] * 2
        assert drawn.tolist() == expected and preview.scores is None
        mask = preview.codes >= 0
        np.testing.assert_array_equal(preview.codes[mask], plain.codes[mask])


def test_previews_show_what_is_drawn(tiny_dalle, plain, tiny_config, to_params):
    """Codes that are not drawn yet are the mean of the codebook: decoded here by putting that row into a codebook."""
    seen = list(tiny_dalle.stream("the cat", every=32, num_candidates=6, batch_size=BATCH, seed=1))
    complete = seen[1]  # the first four have all their codes, the last two none
    np.testing.assert_array_equal(complete.images[:4], plain.images[:4])
    np.testing.assert_array_equal(complete.images[4], complete.images[5])

    codec = tiny_dalle._codec
    mean = np.asarray(codec.params["codebook"]).mean(axis=0)
    table = np.concatenate([np.asarray(codec.params["codebook"]), mean[None]])
    config = dataclasses.replace(tiny_config.stage1, n_embed=81)
    decoder = type(codec.decoder)(config)
    codes = seen[0].codes[:1].reshape(1, 8, 8)
    assert (codes[0, :4] >= 0).all() and (codes[0, 4:] == -1).all()
    expected = decoder.apply(
        {"params": codec.params | {"codebook": table}}, np.where(codes < 0, 80, codes), method="decode"
    )
    expected = np.clip(np.asarray(expected) * 0.5 + 0.5, 0, 1) * 255
    assert np.abs(expected[0] - seen[0].images[0]).max() < 1.01  # truncated to uint8


def test_previews_are_copies(tiny_dalle):
    """Someone who collects them sees the image grow, and not n times the last state."""
    first, second, *_ = tiny_dalle.stream("the cat", every=16, num_candidates=2, batch_size=BATCH)
    assert (first.codes >= 0).sum() == 2 * 16 and (second.codes >= 0).sum() == 2 * 32
    assert (first.images != second.images).any()


def test_a_stream_of_prompts_and_of_a_completion(tiny_dalle, plain, igpt):
    options = {"num_candidates": 2, "batch_size": BATCH, "kept_codes": plain.codes[0, : 2 * WIDTH]}
    *previews, last = tiny_dalle.stream(["the cat", "dog"], every=24, **options)
    same(last, tiny_dalle.generate(["the cat", "dog"], **options))
    assert [(p.codes >= 0).sum(axis=-1)[:, 0].tolist() for p in previews] == [[24, 16], [48, 16], [64, 24], [64, 48]]
    *previews, last = igpt.stream(1, every=32, num_candidates=2, batch_size=BATCH)
    same(last, igpt.generate(1, num_candidates=2, batch_size=BATCH))
    assert len(previews) == 1


def test_a_stream_that_is_left_leaves_no_trace(tiny_dalle, plain):
    """Breaking out of the loop is the simplest stop; settings of JAX must not stay changed, nor memory be held."""
    before = jax.config.jax_default_matmul_precision, jax.config.jax_threefry_partitionable
    for _ in tiny_dalle.stream("the cat", every=8, num_candidates=6, batch_size=BATCH):
        assert (jax.config.jax_default_matmul_precision, jax.config.jax_threefry_partitionable) == before
        break
    assert (jax.config.jax_default_matmul_precision, jax.config.jax_threefry_partitionable) == before


@pytest.mark.parametrize("every", [0, -8, 7, 12, 8.0, True, "8"])
def test_every_is_a_multiple_of_a_row(tiny_dalle, every):
    """Told by the call itself, not by the first step of the loop over it."""
    with pytest.raises(UsageError, match="every must be a multiple of 8 codes, which is one row of the image, or None"):
        tiny_dalle.stream("the cat", every=every)


def test_the_callback_sees_every_row(tiny_dalle, plain):
    seen = []
    drawn = tiny_dalle.generate("the cat", num_candidates=6, batch_size=BATCH, seed=1, callback=seen.append)
    np.testing.assert_array_equal(drawn.codes, plain.codes)
    assert [(p.prompt, list(p.candidates), p.codes, p.codes_total) for p in seen] == [
        (0, candidates, codes, LENGTH) for candidates in ([0, 1, 2, 3], [4, 5]) for codes in range(8, 65, 8)
    ]


def test_the_callback_stops(tiny_dalle, plain, tmp_path):
    """After the first chunk and two rows: what is complete is ranked and saved, the rest is told apart."""
    drawn = tiny_dalle.generate(
        "the cat", num_candidates=6, batch_size=BATCH, seed=1, ranker="likelihood",
        callback=lambda done: done.candidates.start == 4 and done.codes == 16,
    )  # fmt: skip
    np.testing.assert_array_equal(drawn.codes[:4], plain.codes[:4])
    np.testing.assert_array_equal(drawn.images[:4], plain.images[:4])
    np.testing.assert_array_equal(drawn.codes[4:, :16], plain.codes[4:, :16])
    assert (drawn.codes[4:, 16:] == -1).all()
    np.testing.assert_array_equal(drawn.scores[:4], plain.scores[:4])
    assert np.isnan(drawn.scores[4:]).all() and set(drawn.order[4:]) == {4, 5}
    paths = drawn.save(tmp_path / "out")
    assert len(paths) == 4
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert [entry["candidate"] for entry in meta["pictures"]] == drawn.order[:4].tolist()


def test_only_true_stops(tiny_dalle):
    """A callback that happens to return something, as a counter or a list does, goes on."""
    codes = tiny_dalle.generate_codes("the cat", num_candidates=1, batch_size=BATCH, callback=lambda done: done.codes)
    assert codes.min() >= 0
    codes = tiny_dalle.generate_codes("the cat", num_candidates=1, batch_size=BATCH, callback=lambda done: True)
    assert (codes >= 0).sum() == 8
