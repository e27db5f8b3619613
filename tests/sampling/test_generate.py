"""The host loop: likelihoods, rankers, rows of codes, and memory."""

import gc
import types

import jax
import numpy as np
import pytest
from sampling_helpers import BATCH, LENGTH, SIDE, chosen, log_probs

from mindalle_jax import Dalle
from mindalle_jax import base_model as base_model_module
from mindalle_jax.errors import CheckpointError, DeviceMemoryError, UsageError
from mindalle_jax.sampling import generate as generate_module
from mindalle_jax.sampling.generate import request_rows, sample_codes
from mindalle_jax.sampling.options import SamplingOptions

# ---------------------------------------- rows of codes


def six(dalle: Dalle) -> SamplingOptions:
    """Six candidates of one prompt."""
    return SamplingOptions.of(prompts=("the cat",), num_candidates=6).check(dalle.config, dalle.tokenizer)


def test_codes_come_row_by_row(tiny_dalle):
    """Progress, previews and stopping live on it; padding is not given out."""
    request = request_rows(six(tiny_dalle), tiny_dalle.tokenize("the cat"), 80, BATCH)
    drawn = sample_codes(tiny_dalle._networks, request)
    assert [(part.rows[0], part.start, part.values.shape) for part in drawn] == [
        (first, start, (count, 8)) for first, count in ((0, 4), (4, 2)) for start in range(0, 64, 8)
    ]


def test_prefix_ids_out_of_range_are_refused(tiny_dalle):
    """An embedding clamps an id that it does not have, silently."""
    for bad in (-1, 110):
        request = request_rows(six(tiny_dalle), np.full((1, 12), bad, np.int32), 80, BATCH)
        with pytest.raises(UsageError, match=r"\[0, 110\)"):
            next(sample_codes(tiny_dalle._networks, request))


# ---------------------------------------- likelihood


def test_likelihood_is_that_of_the_forward_pass(tiny_dalle, plain):
    """Summed while drawing, by the cached loop, before any filter: 64 float32 sums of order 5 stay within 1e-3."""
    expected = chosen(tiny_dalle, tiny_dalle.tokenize("the cat"), plain.codes).sum(axis=-1)
    np.testing.assert_allclose(plain.scores, expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(plain.order, np.argsort(-expected))
    assert np.ptp(expected) > 1  # the order above is no accident of rounding


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.5}, {"top_k": 5, "top_p": 0.7}, {"guidance_scale": 3.0}], ids=str
)
def test_likelihood_is_before_temperature_filters_and_guidance(tiny_dalle, settings):
    """Else a careful setting would rank its own pictures above those of a daring one, and -inf or 0 come out."""
    drawn = tiny_dalle.generate("dog", num_candidates=3, batch_size=BATCH, ranker="likelihood", **settings)
    expected = chosen(tiny_dalle, tiny_dalle.tokenize("dog"), drawn.codes).sum(axis=-1)
    np.testing.assert_allclose(drawn.scores, expected, rtol=0, atol=1e-3)


def test_likelihood_of_each_prompt_and_of_classes(tiny_dalle, igpt):
    both = tiny_dalle.generate(["the cat", "dog"], num_candidates=3, batch_size=BATCH, ranker="likelihood")
    assert both.scores.shape == both.order.shape == (2, 3)
    for p, prompt in enumerate(both.prompts):
        expected = chosen(tiny_dalle, tiny_dalle.tokenize(prompt), both.codes[p]).sum(axis=-1)
        np.testing.assert_allclose(both.scores[p], expected, rtol=0, atol=1e-3)
    drawn = igpt.generate(2, num_candidates=3, batch_size=BATCH, ranker="likelihood")
    logits = log_probs(igpt.logits(drawn.codes, np.full(3, 2)))
    expected = np.take_along_axis(logits, drawn.codes[..., None], axis=-1).sum(axis=(1, 2))
    np.testing.assert_allclose(drawn.scores, expected, rtol=0, atol=1e-3)


def test_a_ranker_changes_no_picture(tiny_dalle, plain):
    """Scores are beside the pictures, which stay in candidate order."""
    bare = tiny_dalle.generate("the cat", num_candidates=6, batch_size=BATCH, seed=1)
    assert bare.scores is None and bare.order.tolist() == list(range(6))
    np.testing.assert_array_equal(bare.codes, plain.codes)
    np.testing.assert_array_equal(bare.images, plain.images)


# ---------------------------------------- other rankers


class Brightest:
    """A ranker of one's own."""

    def __init__(self):
        self.seen = []

    def scores(self, prompt, images):
        self.seen.append((prompt, images.shape, images.dtype))
        return images.mean(axis=(1, 2, 3), dtype=np.float32)

    def __str__(self):
        return "brightest first"


def test_a_ranker_gets_prompt_and_pictures(tiny_dalle, plain):
    """Whatever has scores(prompt, images): called once a prompt with all its pictures."""
    ranker = Brightest()
    both = tiny_dalle.generate(["the cat", "dog"], num_candidates=6, batch_size=BATCH, seed=1, ranker=ranker)
    assert ranker.seen == [(prompt, (6, SIDE, SIDE, 3), np.uint8) for prompt in ("the cat", "dog")]
    np.testing.assert_array_equal(both.scores, both.images.mean(axis=(2, 3, 4), dtype=np.float32))
    np.testing.assert_array_equal(both.images[0], plain.images)
    assert both.meta["ranker"] == "brightest first"
    best = np.take_along_axis(both.scores, both.order, axis=-1)
    assert (np.diff(best, axis=-1) <= 0).all()


@pytest.mark.parametrize("ranker", [5, True])
def test_what_is_no_ranker_is_refused(tiny_dalle, ranker):
    with pytest.raises(UsageError, match="ranker must be auto, likelihood, off .None., or a CLIP model: .*; not"):
        tiny_dalle.generate("the cat", ranker=ranker)


@pytest.mark.parametrize(("name", "near"), [("likelyhood", "likelihood"), ("ViT-B32", "ViT-B/32"), ("dmeo", "demo")])
def test_a_misspelt_ranker_gets_the_nearest(tiny_dalle, name, near):
    with pytest.raises(CheckpointError, match=f"{name}: no such file or folder, .*; did you mean {near}?"):
        tiny_dalle.generate("the cat", ranker=name)


@pytest.mark.parametrize("scores", [[1.0], [[1.0], [2.0]], 3.0])
def test_scores_of_another_shape_are_refused(tiny_dalle, scores):
    """One score for two images was given to both."""
    ranker = types.SimpleNamespace(scores=lambda prompt, images: np.array(scores))
    with pytest.raises(UsageError, match="the ranker gave scores .* for 2 images"):
        tiny_dalle.generate("the cat", num_candidates=2, ranker=ranker)


def test_without_a_text_nothing_but_the_likelihood_ranks(igpt):
    with pytest.raises(UsageError, match="ranker must be likelihood or off .None. for a model without text, not"):
        igpt.generate(0, ranker=Brightest())


# ---------------------------------------- options


def test_an_unknown_option_is_told(tiny_dalle, igpt):
    """A misspelt option must not be ignored where options are passed on."""
    for call in (
        lambda: tiny_dalle.stream("the cat", topk=5),
        lambda: tiny_dalle.generate_codes("the cat", topk=5),
        lambda: tiny_dalle.variations("the cat", np.zeros(64, int), keep_rows=1, topk=5),
        lambda: igpt.generate(0, topk=5),
    ):
        with pytest.raises(TypeError, match="topk"):
            call()


# ---------------------------------------- memory


def test_memory_is_that_of_a_chunk(tiny_model_folder):
    """20 candidates in chunks of 4 hold on the device what 4 hold: caches of earlier chunks are let go."""

    def live_bytes() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    dalle = Dalle.from_pretrained(tiny_model_folder, mesh=jax.sharding.Mesh(jax.devices()[:1], ("data",)))
    gc.collect()
    base = live_bytes()

    def peak(n: int) -> int:
        peaks: list[int] = []
        dalle.generate("the cat", num_candidates=n, batch_size=BATCH, callback=lambda _: peaks.append(live_bytes()))
        return max(peaks) - base

    one_chunk = peak(4)
    assert one_chunk > 2 * 4 * 4 * 2 * LENGTH * 32  # keys and values of four candidates in two layers, float32
    assert peak(20) < 1.05 * one_chunk


def exhausted(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.")


@pytest.mark.parametrize(("batch_size", "smaller"), [(96, 64), (64, 32), (5, 4), (2, 1)])
def test_out_of_memory_names_a_batch_size(tiny_dalle, monkeypatch, batch_size, smaller):
    """By itself XLA says RESOURCE_EXHAUSTED and a stack trace."""
    monkeypatch.setattr(generate_module, "start_decode", exhausted)
    message = f"{batch_size} candidates at once do not fit into the memory of cpu; try batch_size {smaller} "
    for call in (tiny_dalle.generate, tiny_dalle.generate_codes):
        with pytest.raises(DeviceMemoryError, match=message):
            call("the cat", num_candidates=96, batch_size=batch_size)


def test_out_of_memory_with_one_candidate(tiny_dalle, monkeypatch):
    monkeypatch.setattr(generate_module, "start_decode", exhausted)
    with pytest.raises(DeviceMemoryError, match="not even one candidate fits into the memory of cpu"):
        tiny_dalle.generate("the cat", num_candidates=1)


def test_out_of_memory_while_loading_and_decoding(tiny_model_folder, tiny_dalle, monkeypatch):
    codes = tiny_dalle.generate_codes("the cat", num_candidates=1)
    monkeypatch.setattr(type(tiny_dalle._codec), "decode", exhausted)
    with pytest.raises(DeviceMemoryError, match="too little memory on cpu to decode images"):
        tiny_dalle.generate("the cat", num_candidates=1, kept_codes=codes[0, :8])
    monkeypatch.setattr(base_model_module, "load_params", exhausted)
    with pytest.raises(DeviceMemoryError, match="the weights do not fit into the memory of cpu as bfloat16"):
        Dalle.from_pretrained(tiny_model_folder, dtype="bfloat16")


def test_other_errors_of_xla_are_not_renamed(tiny_dalle, monkeypatch):
    """A bug must not be told as a lack of memory."""

    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(generate_module, "start_decode", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tiny_dalle.generate("the cat", num_candidates=1)
