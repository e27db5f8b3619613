"""Completion and variations: rows of codes that are given stay, and the rest is sampled as it would have been."""

import numpy as np
import pytest
from PIL import Image
from sampling_helpers import BATCH, WIDTH, chosen

from mindalle_jax.errors import UsageError


@pytest.mark.parametrize("keep_rows", [1, 3, 7])
def test_completion_keeps_the_rows(tiny_dalle, plain, keep_rows):
    """Kept codes are untouched, candidates differ below, and likelihood is that of what was drawn."""
    image = plain.images[2]
    drawn = tiny_dalle.complete(
        "the cat", image, keep_rows=keep_rows, num_candidates=6, batch_size=BATCH, ranker="likelihood"
    )
    kept = keep_rows * WIDTH
    codes = tiny_dalle.encode_images(image[None]).reshape(-1)
    np.testing.assert_array_equal(drawn.codes[:, :kept], np.repeat(codes[None, :kept], 6, axis=0))
    assert len({row.tobytes() for row in drawn.codes[:, kept:]}) == 6
    assert drawn.meta["keep_rows"] == keep_rows
    log_p = chosen(tiny_dalle, tiny_dalle.tokenize("the cat"), drawn.codes)
    np.testing.assert_allclose(drawn.scores, log_p[:, kept:].sum(axis=-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_completion_goes_on_as_drawing_would_have(tiny_dalle, guidance_scale):
    """The noise of (seed, candidate, position) is the same, so a candidate's own first rows lead to its own image."""
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


def test_completion_takes_images_in_every_form(tiny_dalle, plain):
    """A PIL image, uint8 and float are one image."""
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
        (np.zeros((32, 32), int), r"the codes of one image are \[8, 8\] or \[64\], not \[32, 32\]"),
        (np.full(64, 80), r"codes must lie in \[0, 80\), not \[80, 80\]"),
        (np.full(64, -1), r"codes must lie in \[0, 80\), not \[-1, -1\]"),
        ("cat.png", r"the image, or its codes: an array of numbers or a PIL image is wanted, not str"),
    ],
)
def test_images_that_cannot_be_completed(tiny_dalle, image, message):
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
