"""Everything around drawing: guidance, completion, likelihood, previews, stopping, rankers, memory."""

import copy
import dataclasses
import gc
import json
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from mindalle_jax import Dalle, ImageGPT
from mindalle_jax import pipeline as pipeline_module
from mindalle_jax.errors import DeviceMemoryError, UsageError
from mindalle_jax.models.attention import DECODE_ATTENTION, PRIVATE_PREFIX, decode_attention_cudnn
from mindalle_jax.sampling import decode as decode_module
from mindalle_jax.sampling import generate as generate_module
from mindalle_jax.sampling.decode import cache_lengths, prefill, sample_row, start_decode
from mindalle_jax.sampling.generate import request_rows
from mindalle_jax.sampling.options import SamplingOptions

BATCH = 4  # one compiled size for all tests
WIDTH, LENGTH, SIDE = 8, 64, 32  # codes in a row, in a picture; pixels


@pytest.fixture(scope="module")
def plain(tiny_dalle):
    """Six candidates: two chunks, the second one padded."""
    return tiny_dalle.generate("the cat", num_candidates=6, batch_size=BATCH, seed=1, ranker="likelihood")


@pytest.fixture(scope="module")
def igpt(tiny_igpt_model_folder):
    return ImageGPT.from_pretrained(tiny_igpt_model_folder)


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


# ---------------------------------------- a growing cache


@pytest.mark.parametrize(
    ("quantize", "attention", "options"),
    [
        (None, "xla", {}),
        ("weights+cache", "xla-lanes", {"guidance_scale": 2.0}),
        (None, "xla", {"jacobi": True}),
        (None, "xla-lanes", {"keep_rows": 3}),
    ],
    ids=str,
)
def test_a_cache_that_grows_draws_the_same_codes(tiny_model_folder, monkeypatch, quantize, attention, options):
    """From two rows to all eight, in four sizes, on two devices. Likelihoods but for the order of sums."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    model = Dalle.from_pretrained(tiny_model_folder, quantize=quantize, mesh=mesh)
    model._transformer = model._transformer.copy(attention=attention)
    shared = {"num_candidates": 3, "batch_size": 1, "seed": 1, "ranker": "likelihood"} | options
    if "keep_rows" in options:
        shared["kept_codes"] = np.arange(shared.pop("keep_rows") * WIDTH)
    whole = model.generate("the cat", **shared)
    monkeypatch.setitem(decode_module.NUM_CACHE_SIZES, "cpu", 4)
    assert cache_lengths(model._transformer, "cpu") == [16, 32, 48, 64]
    grown = model.generate("the cat", **shared)
    np.testing.assert_array_equal(grown.codes, whole.codes)
    np.testing.assert_allclose(grown.scores, whole.scores, rtol=0, atol=1e-3)


@pytest.mark.parametrize("attention", [*PRIVATE_PREFIX, "xla-lanes", "pallas", "reference"])
@pytest.mark.parametrize("options", [{"guidance_scale": 2.0}, {"keep_rows": 3}], ids=str)
def test_every_backend_of_attention_draws_the_same_codes(tiny_dalle, monkeypatch, attention, options):
    """After one prefix and after two, and below rows that are given."""
    monkeypatch.setitem(DECODE_ATTENTION, "cudnn", partial(decode_attention_cudnn, implementation="xla"))
    shared = {"num_candidates": 3, "batch_size": BATCH, "seed": 1, "ranker": "likelihood"} | options
    if "keep_rows" in options:
        shared["kept_codes"] = np.arange(shared.pop("keep_rows") * WIDTH)
    expected = tiny_dalle.generate("the cat", **shared)
    other = copy.copy(tiny_dalle)
    other._transformer = tiny_dalle._transformer.copy(attention=attention)
    drawn = other.generate("the cat", **shared)
    np.testing.assert_array_equal(drawn.codes, expected.codes)
    np.testing.assert_allclose(drawn.scores, expected.scores, rtol=0, atol=1e-3)


def test_sizes_of_the_cache(tiny_dalle, monkeypatch):
    """Whole rows, however many sizes; one for the kernel that reads what is filled."""
    model = tiny_dalle._transformer
    for sizes, expected in ((1, [64]), (3, [24, 48, 64]), (8, list(range(8, 65, 8))), (20, list(range(8, 65, 8)))):
        monkeypatch.setitem(decode_module.NUM_CACHE_SIZES, "cpu", sizes)
        assert cache_lengths(model, "cpu") == expected
    assert cache_lengths(model, "gpu") == [16, 32, 48, 64]
    for attention in ("pallas", *PRIVATE_PREFIX):
        assert cache_lengths(model.copy(attention=attention), "gpu") == [64]


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


@pytest.mark.parametrize("ranker", ["clip", 5, True, "openai/clip-vit-base-patch32"])
def test_what_is_no_ranker_is_refused(tiny_dalle, ranker):
    with pytest.raises(UsageError, match="ranker must be None, 'likelihood' or a ClipRanker, not"):
        tiny_dalle.generate("the cat", ranker=ranker)


def test_without_a_text_nothing_but_the_likelihood_ranks(igpt):
    with pytest.raises(UsageError, match="without a text ranker must be None or 'likelihood', not"):
        igpt.generate(0, ranker=Brightest())


# ---------------------------------------- guidance


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


# ---------------------------------------- Jacobi decoding


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.8, "seed": 9}, {"guidance_scale": 2.0}],
    ids=["plain", "greedy", "filtered", "guided"],
)
def test_jacobi_decoding_draws_the_same_codes(tiny_dalle, options):
    """Six candidates in chunks of four. Logits of a window differ in their last bits, which decides no draw here."""
    options = {"num_candidates": 6, "batch_size": BATCH, "ranker": "likelihood"} | options
    one, rows = (tiny_dalle.generate("the cat", jacobi=jacobi, **options) for jacobi in (False, True))
    np.testing.assert_array_equal(one.codes, rows.codes)
    np.testing.assert_allclose(one.scores, rows.scores, rtol=0, atol=1e-3)
    assert (one.meta["jacobi"], rows.meta["jacobi"]) == (False, True)


def test_jacobi_decoding_completes_pictures_and_knows_classes(tiny_dalle, igpt, plain):
    options = {"num_candidates": 3, "batch_size": BATCH}
    for draw in (
        lambda jacobi: tiny_dalle.variations("the cat", plain.codes[0], keep_rows=3, jacobi=jacobi, **options),
        lambda jacobi: igpt.generate(2, jacobi=jacobi, **options),
    ):
        np.testing.assert_array_equal(draw(True).codes, draw(False).codes)


def test_a_candidate_of_jacobi_decoding_does_not_depend_on_the_others(tiny_dalle):
    """Passes go on until the slowest of a chunk is done, and change nothing of those that are."""
    options = {"batch_size": BATCH, "jacobi": True, "seed": 5}
    whole = tiny_dalle.generate_codes("the cat", num_candidates=6, **options)
    np.testing.assert_array_equal(tiny_dalle.generate_codes("the cat", num_candidates=2, **options), whole[:2])


def test_jacobi_decoding_takes_fewer_passes_where_codes_can_be_guessed(tiny_dalle, plain):
    """At least one pass a row, at most one a code and one more; few, if the row above is the answer."""
    model, params, mesh = tiny_dalle._transformer, tiny_dalle._stage2, tiny_dalle.mesh
    options = SamplingOptions.of(prompts=("the cat",), num_candidates=BATCH, seed=1, top_k=None)
    prefix_ids = tiny_dalle.tokenize("the cat")
    rows = request_rows(options.check(tiny_dalle.config), prefix_ids, 80, BATCH).rows
    prefix, passes = prefill(model, params, prefix_ids[0], np.zeros(0, np.int32), np.int32(0)), []
    with jax.threefry_partitionable(True), jax.default_matmul_precision("highest"):
        for guess in (np.full((BATCH, WIDTH), -1, np.int32), plain.codes[:BATCH, :WIDTH]):
            state = start_decode(model, mesh, BATCH, LENGTH, False, prefix, np.int32(0))
            state, codes = sample_row(model, mesh, True, params, prefix.kv, rows, state, guess)
            np.testing.assert_array_equal(codes, plain.codes[:BATCH, :WIDTH])
            passes.append(set(np.asarray(state.passes).tolist()))
    assert passes[1] == {1} and len(passes[0]) == 1 and 2 <= min(passes[0]) <= WIDTH + 1


@pytest.mark.parametrize("jacobi", [0, "yes", None])
def test_jacobi_is_true_or_false(tiny_dalle, jacobi):
    with pytest.raises(UsageError, match="jacobi must be True or False, not"):
        tiny_dalle.generate("the cat", jacobi=jacobi)


# ---------------------------------------- completion and variations


@pytest.mark.parametrize("keep_rows", [1, 3, 7])
def test_completion_keeps_the_rows(tiny_dalle, plain, keep_rows):
    """Kept codes are untouched, candidates differ below, and likelihood is that of what was drawn."""
    picture = plain.images[2]
    drawn = tiny_dalle.complete(
        "the cat", picture, keep_rows=keep_rows, num_candidates=6, batch_size=BATCH, ranker="likelihood"
    )
    kept = keep_rows * WIDTH
    codes = tiny_dalle.encode_images(picture[None]).reshape(-1)
    np.testing.assert_array_equal(drawn.codes[:, :kept], np.repeat(codes[None, :kept], 6, axis=0))
    assert len({row.tobytes() for row in drawn.codes[:, kept:]}) == 6
    assert drawn.meta["keep_rows"] == keep_rows
    log_p = chosen(tiny_dalle, tiny_dalle.tokenize("the cat"), drawn.codes)
    np.testing.assert_allclose(drawn.scores, log_p[:, kept:].sum(axis=-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_completion_goes_on_as_drawing_would_have(tiny_dalle, guidance_scale):
    """The noise of (seed, candidate, position) is the same, so a candidate's own first rows lead to its own picture."""
    options = {"batch_size": BATCH, "seed": 6, "guidance_scale": guidance_scale}
    drawn = tiny_dalle.generate("the cat", num_candidates=3, **options)
    for candidate in range(3):
        again = tiny_dalle.variations("the cat", drawn.codes[candidate], keep_rows=4, num_candidates=3, **options)
        np.testing.assert_array_equal(again.codes[candidate], drawn.codes[candidate])
        assert (again.codes[:, : 4 * WIDTH] == drawn.codes[candidate, : 4 * WIDTH]).all()
    other = tiny_dalle.variations("the cat", drawn.codes[0], keep_rows=4, num_candidates=3, **(options | {"seed": 7}))
    assert (other.codes[:, 4 * WIDTH :] != drawn.codes[0, 4 * WIDTH :]).any(axis=-1).all()


def test_what_lies_below_the_kept_rows_has_no_effect(tiny_dalle, plain):
    """Raster order: codes that are not kept must not leak into the logits."""
    options = {"keep_rows": 2, "num_candidates": 3, "batch_size": BATCH}
    codes = plain.codes[0].copy()
    first = tiny_dalle.variations("the cat", codes, **options)
    codes[2 * WIDTH :] = (codes[2 * WIDTH :] + 17) % 80
    np.testing.assert_array_equal(tiny_dalle.variations("the cat", codes, **options).codes, first.codes)


def test_completion_takes_pictures_in_every_form(tiny_dalle, plain):
    """A PIL image, uint8 and float are one picture."""
    options = {"keep_rows": 3, "num_candidates": 2, "batch_size": BATCH}
    image = plain.images[0]
    drawn = tiny_dalle.complete("the cat", image, **options)
    for other in (Image.fromarray(image), image.astype(np.float32) / 255):
        np.testing.assert_array_equal(tiny_dalle.complete("the cat", other, **options).codes, drawn.codes)


def test_completion_compiles_once(tiny_dalle, plain, compilations):
    """Another number of rows is no other program: 20 s at full size."""
    options = {"num_candidates": 3, "batch_size": BATCH}
    tiny_dalle.complete("the cat", plain.images[0], keep_rows=1, **options)
    before = len(compilations)
    tiny_dalle.complete("dog", plain.images[1], keep_rows=6, **options)
    tiny_dalle.variations("dog", plain.codes[1], keep_rows=7, **options)
    assert len(compilations) == before


def test_an_image_only_model_completes(igpt, plain):
    drawn = igpt.complete(plain.images[0], keep_rows=5, class_id=3, num_candidates=3, batch_size=BATCH)
    codes = igpt.encode_images(plain.images[:1]).reshape(-1)[: 5 * WIDTH]
    assert (drawn.codes[:, : 5 * WIDTH] == codes).all() and drawn.prompts == ["class 3"]
    assert len({row.tobytes() for row in drawn.codes}) == 3


@pytest.mark.parametrize("keep_rows", [0, -1, 8, 9, 2.0, True, "3", None])
def test_keep_rows_out_of_range(tiny_dalle, plain, keep_rows):
    message = r"keep_rows must be an integer in \[1, 7\], rows of codes, each 4 pixels high; not"
    with pytest.raises(UsageError, match=message):
        tiny_dalle.complete("the cat", plain.images[0], keep_rows=keep_rows)
    with pytest.raises(UsageError, match=message):
        tiny_dalle.variations("the cat", plain.codes[0], keep_rows=keep_rows)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (32, 31)), "is 32 x 31 pixels; this model knows 32 x 32 only: crop or resize it first"),
        (Image.new("L", (32, 32)), "has the mode L; convert it to RGB first"),
        (Image.new("RGBA", (32, 32)), "has the mode RGBA; convert it to RGB first"),
        (Image.new("P", (32, 32)), "has the mode P; convert"),
        (np.zeros((64, 32, 3), np.uint8), "is 32 x 64 pixels; this model knows 32 x 32 only"),
        (np.zeros((32, 32, 4), np.uint8), r"an image must be \[32, 32, 3\], not \[32, 32, 4\]"),
        (np.zeros((32, 32, 3), np.int32), "images must be uint8 or floating point, not int32"),
        (np.full((32, 32, 3), 1.5), r"must lie in \[0, 1\], not \[1.5, 1.5\]"),
        (np.full((32, 32, 3), np.nan), r"must lie in \[0, 1\], not \[nan, nan\]"),
        (np.zeros((32, 32), int), r"codes must be \[n, 8, 8\] or \[n, 64\], not \[1, 32, 32\]"),
        (np.full(64, 80), r"codes must lie in \[0, 80\), not \[80, 80\]"),
        (np.full(64, -1), r"codes must lie in \[0, 80\), not \[-1, -1\]"),
        ("cat.png", r"codes must be \[8, 8\] or \[64\]: an array of numbers or a PIL image is wanted, not str"),
    ],
)
def test_pictures_that_cannot_be_completed(tiny_dalle, image, message):
    """One line that says what is wrong, not an error deep in a convolution."""
    with pytest.raises(UsageError, match=message) as raised:
        tiny_dalle.complete("the cat", image, keep_rows=2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kept", [np.zeros(7, int), np.zeros(64, int), np.zeros((1, 8), int), np.zeros(9, int)])
def test_kept_codes_are_whole_rows(tiny_dalle, kept):
    with pytest.raises(UsageError, match=r"prompt_codes must be the codes of whole rows, \[m\] with m a multiple of 8"):
        tiny_dalle.generate("the cat", kept_codes=kept)
    with pytest.raises(UsageError, match=r"prompt_codes must lie in \[0, 80\)"):
        tiny_dalle.generate("the cat", kept_codes=np.full(8, 80))


# ---------------------------------------- streaming and stopping


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
    """Someone who collects them sees the picture grow, and not n times the last state."""
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
    with pytest.raises(
        UsageError, match="every must be a multiple of 8 codes, which is one row of the picture, or None"
    ):
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


@pytest.mark.parametrize(("rows", "ahead"), [(1, [0, 4, 6, 10, 12]), (5, [0, 0, 5, 10, 10])])
def test_pictures_are_decoded_while_others_are_drawn(tiny_dalle, monkeypatch, rows, ahead):
    """As on a GPU: as soon as there are enough for a compiled call, over chunks and prompts; and the same pictures."""
    codec = tiny_dalle._codec
    monkeypatch.setattr(codec, "decode_rows", rows)
    options = {"num_candidates": 6, "batch_size": BATCH, "seed": 1}
    expected = tiny_dalle.generate(["the cat", "dog"], **options)
    begun, seen, begin = [], [], codec.start_decode

    def watch(codes):
        begun.extend(codes)
        return begin(codes)

    monkeypatch.setattr(codec, "decode_ahead", True)
    monkeypatch.setattr(codec, "start_decode", watch)
    chunk_begins = lambda done: seen.append(len(begun)) if done.codes == WIDTH else None  # noqa: E731
    drawn = tiny_dalle.generate(["the cat", "dog"], callback=chunk_begins, **options)
    np.testing.assert_array_equal(drawn.images, expected.images)
    assert [*seen, len(begun)] == ahead  # of 4 + 2 + 4 + 2, when a chunk had its first row, and at the end


def test_only_true_stops(tiny_dalle):
    """A callback that happens to return something, as a counter or a list does, goes on."""
    codes = tiny_dalle.generate_codes("the cat", num_candidates=1, batch_size=BATCH, callback=lambda done: done.codes)
    assert codes.min() >= 0
    codes = tiny_dalle.generate_codes("the cat", num_candidates=1, batch_size=BATCH, callback=lambda done: True)
    assert (codes >= 0).sum() == 8


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
    with pytest.raises(DeviceMemoryError, match=message):
        tiny_dalle.generate("the cat", num_candidates=96, batch_size=batch_size)


def test_out_of_memory_with_one_candidate(tiny_dalle, monkeypatch):
    monkeypatch.setattr(generate_module, "start_decode", exhausted)
    with pytest.raises(DeviceMemoryError, match="not even one candidate fits into the memory of cpu"):
        tiny_dalle.generate("the cat", num_candidates=1)


def test_out_of_memory_while_loading_and_decoding(tiny_model_folder, tiny_dalle, monkeypatch):
    codes = tiny_dalle.generate_codes("the cat", num_candidates=1)
    monkeypatch.setattr(type(tiny_dalle._codec), "decode", exhausted)
    with pytest.raises(DeviceMemoryError, match="no room to decode pictures in the memory of cpu"):
        tiny_dalle.generate("the cat", num_candidates=1, kept_codes=codes[0, :8])
    monkeypatch.setattr(pipeline_module, "load_params", exhausted)
    with pytest.raises(DeviceMemoryError, match="the weights do not fit into the memory of cpu as bfloat16"):
        Dalle.from_pretrained(tiny_model_folder, dtype="bfloat16")


def test_other_errors_of_xla_are_not_renamed(tiny_dalle, monkeypatch):
    """A bug must not be told as a lack of memory."""

    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(generate_module, "start_decode", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tiny_dalle.generate("the cat", num_candidates=1)
