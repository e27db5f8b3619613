"""Resizing images as CLIP's preprocessing does: Pillow's bicubic, bit for bit, on the host or on the device.

Dimensions: b batch, y height, x width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

PRECISION_BITS = 32 - 8 - 2
"""Weights of the resampling are integers in units of 2**-22, as in Pillow."""


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[y, x, 3] -> uint8[size, size, 3] by Pillow: see ClipRanker.encode_images.

    Size 4: 6 x 13 pixels become 4 x int(4 * 13 / 6) = 4 x 8, of which columns 2 to 5 stay; of 7 columns, (7 - 4) / 2 =
    1.5 is rounded to 2 (to the even number, as Python does), and columns 2 to 5 stay.
    """
    y, x = (int(size * side / min(image.shape[:2])) for side in image.shape[:2])
    top, left = int(round((y - size) / 2)), int(round((x - size) / 2))
    resized = Image.fromarray(image).resize((x, y), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def resize_square(images: jax.Array, size: int) -> jax.Array:
    """uint8[b, s, s, 3] -> uint8[b, size, size, 3]: bit by bit Pillow's `Image.resize`, bicubic with antialiasing.

    Horizontally, then vertically, each rounded to uint8; Pillow's Resample.c.
    """
    if images.shape[1] == size:
        return images
    taps = resampling_taps(images.shape[1], size)
    across = _resample_columns(images, *taps)
    return _resample_columns(across.swapaxes(1, 2), *taps).swapaxes(1, 2)


def resampling_taps(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of a line make a pixel of the resized line: first int[out_size], weights int32[out_size, taps].

    Output i is the sum over t of weights[i, t] * input[first[i] + t], in units of 2**-22; weights beyond the line are
    0. The cubic with a = -0.5 (Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981), as wide as
    the step between outputs where that is over 1, in float64 and rounded, as precompute_coeffs and
    normalize_coeffs_8bpc of Pillow do.

    4 -> 2: the centres of the outputs are 1 and 3, those of the inputs .5, 1.5, 2.5 and 3.5, and the cubic is twice as
    wide. Output 0 is .459, .459, .120 and -.037 of the inputs, which is the cubic at .25, .25, .75 and 1.25 divided by
    its sum.
    """
    step = in_size / out_size
    stretch = max(step, 1.0)
    centers = (np.arange(out_size) + 0.5) * step
    first = np.maximum((centers - 2 * stretch + 0.5).astype(int), 0)
    last = np.minimum((centers + 2 * stretch + 0.5).astype(int), in_size)
    inputs = first[:, None] + np.arange(np.max(last - first))
    x = np.abs((inputs - centers[:, None] + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    cubic = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    cubic[inputs >= last[:, None]] = 0
    weights = cubic / np.cumsum(cubic, axis=1)[:, -1:]  # summed from left to right, as Pillow does
    return first, np.trunc(weights * (1 << PRECISION_BITS) + np.copysign(0.5, weights)).astype(np.int32)


def _resample_columns(images: jax.Array, first: np.ndarray, weights: np.ndarray) -> jax.Array:
    """uint8[b, y, x, 3] -> uint8[b, y, out, 3], of taps from resampling_taps.

    int32 is enough: the weights of an output sum to 2**22, their absolute values to at most 1.3 times that (the lobes
    of the cubic are small), and 255 * 1.3 * 2**22 + 2**21 = 1.4e9 is below 2**31.
    """
    total = jnp.int32(1 << (PRECISION_BITS - 1))  # a half, so that the shift rounds
    for tap, weight in enumerate(weights.T):
        column = jnp.take(images, first + tap, axis=2, mode="clip")  # where it is clipped the weight is 0
        total += column.astype(jnp.int32) * weight[:, None]
    return jnp.clip(total >> PRECISION_BITS, 0, 255).astype(jnp.uint8)
