"""Bicubic resizing and cropping: bit by bit the pixels of Pillow and torchvision."""

import jax
import numpy as np
import pytest
from PIL import Image

from mindalle_jax.models.clip import Preprocessing
from mindalle_jax.ranking.resize import on_device, resampling_taps, resize_and_crop, resize_square


def squares(side: int) -> np.ndarray:
    """uint8[b, side, side, 3]: noise, a gradient, checkerboards of 0 and 255, noise of extremes, black and white."""
    rng = np.random.default_rng(side)
    y, x = np.indices((side, side))
    planes = [(x + y) * 255 // max(2 * side - 2, 1), (x + y) % 2 * 255, (x // 3 + y // 2) % 2 * 255, 0 * x, 0 * x + 255]
    noise = [rng.integers(0, 256, (side, side, 3)), rng.integers(0, 2, (side, side, 3)) * 255]
    return np.stack([*noise, *(plane[..., None].repeat(3, axis=-1) for plane in planes)]).astype(np.uint8)


@pytest.mark.parametrize(
    ("side", "size"),
    [(side, 224) for side in (32, 64, 100, 223, 224, 225, 256, 299, 512)]
    + [(side, 32) for side in (1, 2, 3, 31, 32, 33, 48, 257)]
    + [(100, 1), (7, 5)],
)
def test_squares_are_resized_bit_by_bit_as_by_pillow(side, size):
    """Every grey level, also where a lobe of the cubic goes below 0 or above 255."""
    images = squares(side)
    expected = [Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC) for p in images]
    resized = jax.jit(resize_square, static_argnums=1)(images, size)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, np.stack([np.asarray(image) for image in expected]))


def test_the_example_of_resampling_taps():
    first, weights = resampling_taps(4, 2)
    np.testing.assert_array_equal(first, [0, 0])
    halves = np.array([0.459, 0.459, 0.120, -0.037])
    np.testing.assert_allclose(weights / 2**22, [halves, halves[::-1]], atol=5e-4)


def test_resampling_cannot_overflow():
    """int32 wraps silently; the bound is that of _resample_columns, for up- and downscaling by any factor."""
    for size in (1, 3, 32, 224, 336):
        for side in (*range(1, 400, 3), *range(400, 5000, 97)):
            first, weights = resampling_taps(side, size)
            assert (0 <= first).all() and (first < side).all()
            assert np.abs(weights.astype(np.int64)).sum(axis=1).max() <= 1.3 * 2**22
            np.testing.assert_allclose(weights.sum(axis=1), 2**22, atol=weights.shape[1] / 2)


@pytest.mark.parametrize(
    ("height", "width", "start"),
    [
        (48, 64, 5),  # 32 x 42: (42 - 32) / 2 = 5
        (64, 33, 15),  # 62 x 32: 15
        (48, 53, 2),  # 32 x 35: 1.5, where Hugging Face begins at 1
        (53, 48, 2),
        (48, 50, 0),  # 32 x 33: 0.5, rounded to the even 0
        (20, 29, 7),  # upscaled to 32 x 46: 7
        (32, 40, 4),  # not resized at all
    ],
)
def test_other_shapes_are_resized_and_cropped_as_by_torchvision(height, width, start):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    if height < width:
        resized = Image.fromarray(image).resize((int(32 * width / height), 32), Image.Resampling.BICUBIC)
        expected = np.asarray(resized)[:, start : start + 32]
    else:
        resized = Image.fromarray(image).resize((32, int(32 * height / width)), Image.Resampling.BICUBIC)
        expected = np.asarray(resized)[start : start + 32]
    np.testing.assert_array_equal(resize_and_crop(image, Preprocessing(32, 32)), expected)


def test_the_examples_of_resize_and_crop():
    """Which pixels are kept of 4 x 7: 2 to 5 as in torchvision, 1 to 4 as in transformers."""
    columns = np.arange(7, dtype=np.uint8) * 30
    image = np.broadcast_to(columns[None, :, None], (4, 7, 3))
    for round_down, kept in ((False, columns[2:6]), (True, columns[1:5])):
        cropped = resize_and_crop(image, Preprocessing(4, 4, round_down=round_down))
        np.testing.assert_array_equal(cropped[0, :, 0], kept)


@pytest.mark.parametrize(
    ("preprocessing", "expected"),
    [
        (Preprocessing(32, 32), True),
        (Preprocessing(32, None), True),
        (Preprocessing(32, 32, mean=(0.5, 0.5, 0.5), round_down=True), True),
        (Preprocessing(32, 36), False),
        (Preprocessing(32, 32, resample=2), False),
    ],
)
def test_what_the_device_can_do(preprocessing, expected):
    """Where it can, both give the same bits."""
    assert on_device(preprocessing) == expected
    images = squares(40)
    on_host = np.stack([resize_and_crop(image, preprocessing) for image in images])
    assert np.array_equal(resize_square(images, 32), on_host) == expected
