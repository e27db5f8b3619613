"""Images <-> codes: shapes and ranges, chunks of one compiled size, and what is refused."""

import jax
import numpy as np
import pytest
from PIL import Image
from sampling_helpers import BATCH, WIDTH

from mindalle_jax.errors import UsageError


def test_codes_and_images_have_their_shapes_and_ranges(tiny_dalle, tiny_images):
    assert tiny_dalle.image_size == 32
    assert tiny_images.shape == (3, 32, 32, 3) and tiny_images.dtype == np.float32
    assert tiny_images.min() >= 0 and tiny_images.max() <= 1 and tiny_images.std() > 0.05
    codes = tiny_dalle.encode_images(tiny_images)
    assert codes.shape == (3, 8, 8) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < 80
    again = tiny_dalle.decode_codes(codes)
    np.testing.assert_array_equal(again, tiny_dalle.decode_codes(codes.reshape(3, 64)))
    np.testing.assert_array_equal(again, tiny_dalle.decode_codes(codes.tolist()))


def test_uint8_and_float_images_are_the_same(tiny_dalle, tiny_images):
    """uint8 is divided by 255; float16 and float64 work too."""
    whole = (tiny_images * 255).astype(np.uint8)
    codes = tiny_dalle.encode_images(whole)
    np.testing.assert_array_equal(codes, tiny_dalle.encode_images(whole.astype(np.float32) / 255))
    np.testing.assert_array_equal(codes, tiny_dalle.encode_images((whole / 255).astype(np.float64)))
    assert tiny_dalle.encode_images(tiny_images.astype(np.float16)).shape == (3, 8, 8)


def test_pixels_and_codes_do_not_depend_on_how_many_there_are(tiny_dalle, tiny_images):
    """A batch of another shape changes last bits, and then the uint8 of some pixel."""
    codes = tiny_dalle.encode_images(tiny_images)
    decoded = tiny_dalle.decode_codes(codes)
    for i in range(3):
        np.testing.assert_array_equal(tiny_dalle.decode_codes(codes[i : i + 1])[0], decoded[i])
        np.testing.assert_array_equal(tiny_dalle.encode_images(tiny_images[i : i + 1])[0], codes[i])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((1, 63), int), r"codes must be \[n, 8, 8\] or \[n, 64\], not \[1, 63\]"),
        (np.zeros((1, 4, 16), int), r"codes must be \[n, 8, 8\] or \[n, 64\]"),
        (np.zeros((8, 7), int), r"codes must be \[n, 8, 8\] or \[n, 64\], not \[8, 7\]"),
        (np.zeros(63, int), r"codes must be"),
        (np.zeros((0, 64), int), r"codes must be"),
        (np.zeros((1, 64)), r"codes must be integers, not float64"),
        (np.full((1, 64), 80), r"codes must lie in \[0, 80\), not \[80, 80\]"),
        (np.full((1, 64), -1), r"codes must lie in \[0, 80\), not \[-1, -1\]"),
        (np.full((1, 64), 2**40), r"codes must lie in \[0, 80\)"),
    ],
)
def test_codes_of_a_wrong_shape_or_range_are_refused(tiny_dalle, codes, message):
    """jnp.take fills what is out of range with NaN: a black image."""
    with pytest.raises(UsageError, match=message):
        tiny_dalle.decode_codes(codes)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 64, 64, 3), np.uint8), r"images must be \[n, 32, 32, 3\] for this model, not \[1, 64, 64, 3\]"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"images must be \[n, 32, 32, 3\]"),
        (np.zeros((32, 32), np.uint8), r"images must be"),
        ([Image.new("L", (32, 32))], "the image has the mode L; convert it to RGB first"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"images must be"),
        (np.zeros((1, 32, 32, 3), np.int64), r"uint8 or floating point, not int64"),
        (np.full((1, 32, 32, 3), 255.0), r"must lie in \[0, 1\], not \[255, 255\]"),
        (np.full((1, 32, 32, 3), -1.0), r"must lie in \[0, 1\]"),
        (np.full((1, 32, 32, 3), np.nan), r"must lie in \[0, 1\]"),
    ],
)
def test_images_of_a_wrong_shape_or_range_are_refused(tiny_dalle, images, message):
    """An image in [-1, 1] or in 0..255 would be encoded, to something else."""
    with pytest.raises(UsageError, match=message):
        tiny_dalle.encode_images(images)


@pytest.mark.parametrize(("rows", "ahead"), [(1, [0, 4, 6, 10, 12]), (5, [0, 0, 5, 10, 10])])
def test_images_are_decoded_while_others_are_drawn(tiny_dalle, monkeypatch, rows, ahead):
    """As on a GPU: as soon as there are enough for a compiled call, over chunks and prompts; and the same images."""
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


def test_images_are_decoded_in_chunks_of_one_size(tiny_dalle, monkeypatch):
    """Seven codes in calls of five: the padding of the second is not given out, and changes nothing."""
    codec = tiny_dalle._codec
    monkeypatch.setattr(codec, "decode_rows", 5)
    codes = np.random.default_rng(2).integers(0, 80, (7, 8, 8)).astype(np.int32)
    chunks = list(codec.decode(codes))
    assert [chunk.shape for chunk in chunks] == [(5, 32, 32, 3), (2, 32, 32, 3)]
    np.testing.assert_array_equal(next(codec.decode(codes[5:])), chunks[1])
    dispatched = codec.start_decode(codes[:5])
    assert isinstance(dispatched, jax.Array) and dispatched.dtype == np.uint8
    np.testing.assert_array_equal(dispatched, chunks[0])
    floats = np.concatenate(list(codec.decode_floats(codes)))
    np.testing.assert_array_equal((floats * 255).astype(np.uint8), np.concatenate(chunks))


def test_images_are_encoded_in_chunks(tiny_dalle, tiny_images):
    """Three images in calls of two: random images have no two codes that are equally near."""
    codes = tiny_dalle._codec.encode(tiny_images, batch_size=2)
    np.testing.assert_array_equal(codes, tiny_dalle.encode_images(tiny_images))


@pytest.mark.parametrize("keep_rows", [1, 7])
def test_rows_of_an_image_are_the_first_of_its_codes(tiny_dalle, tiny_images, keep_rows):
    """Of one image in any form, and of its codes, which are not decoded and encoded again."""
    codec, image = tiny_dalle._codec, (tiny_images[1] * 255).astype(np.uint8)
    (codes,) = codec.encode(image[None])
    forms = [image, Image.fromarray(image), image.astype(np.float32) / 255, codes, codes.reshape(-1), codes.tolist()]
    for form in forms:
        rows = codec.encode_rows(form, keep_rows)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, codes[:keep_rows].reshape(-1))


def test_codes_of_one_image_are_taken(tiny_dalle):
    """As images.codes[0] gives them, and as encode_images(image)[0] does."""
    codes = np.random.default_rng(3).integers(0, 80, 64)
    expected = tiny_dalle.decode_codes(codes[None])
    for given in (codes, codes.reshape(8, 8)):
        np.testing.assert_array_equal(tiny_dalle.decode_codes(given), expected)


def test_one_image_and_a_list_of_pil_images_are_taken(tiny_dalle, tiny_images):
    """What people have in hand; the codes are those of the array."""
    images = (np.asarray(tiny_images) * 255).astype(np.uint8)
    expected = tiny_dalle.encode_images(images)
    pil = [Image.fromarray(image) for image in images]
    for given in (pil, tuple(pil), list(images)):
        np.testing.assert_array_equal(tiny_dalle.encode_images(given), expected)
    for given in (pil[1], images[1]):
        np.testing.assert_array_equal(tiny_dalle.encode_images(given), expected[1:2])
