"""Resizes images as CLIP's preprocessing does: with Pillow's bicubic filter, bit for bit, on the host or the device.

Dimensions: b batch, y height, x width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mindalle_jax.models.clip import Preprocessing

PRECISION_BITS = 32 - 8 - 2
"""Weights of the resampling are integers in units of 2**-22, as in Pillow."""


def resize_and_crop(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resizes and crops an image with Pillow, uint8[y, x, 3] -> uint8[size, size, 3]; see ClipRanker.encode_images.

    Example for size 4: 6 x 13 pixels become 4 x int(4 * 13 / 6) = 4 x 8, and columns 2 to 5 are kept. Of 7 columns also
    2 to 5 are kept, because (7 - 4) / 2 = 1.5 is rounded to the even number 2, as Python does; with round_down 1 to 4.
    """
    size, short_side = preprocessing.size, preprocessing.short_side
    if short_side is None:
        y, x = size, size
    else:
        y, x = (int(short_side * side / min(image.shape[:2])) for side in image.shape[:2])
    start = (lambda side: (side - size) // 2) if preprocessing.round_down else (lambda side: round((side - size) / 2))
    top, left = start(y), start(x)
    resized = Image.fromarray(image).resize((x, y), Image.Resampling(preprocessing.resample))
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def on_device(preprocessing: Preprocessing) -> bool:
    """Returns whether resize_square does all that resize_and_crop would do to square images."""
    whole = preprocessing.short_side in (None, preprocessing.size)
    return whole and preprocessing.resample == Image.Resampling.BICUBIC


def resize_square(images: jax.Array, size: int) -> jax.Array:
    """Resizes images, uint8[b, s, s, 3] -> uint8[b, size, size, 3]. The bits are those of Pillow's bicubic filter.

    It resizes horizontally, then vertically, and rounds to uint8 each time, as in Pillow's Resample.c.
    """
    if images.shape[1] == size:
        return images
    taps = resampling_taps(images.shape[1], size)
    across = _resample_columns(images, *taps)
    return _resample_columns(across.swapaxes(1, 2), *taps).swapaxes(1, 2)


def resampling_taps(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights that resize a line of pixels: first int[out_size], and weights int32[out_size, taps].

    Output i is the sum over t of weights[i, t] * input[first[i] + t], in units of 2**-22. Weights beyond the line are
    0. The filter is the cubic with a = -0.5 (Keys, "Cubic Convolution Interpolation for Digital Image Processing",
    1981). If the step between outputs is over 1 pixel, the filter is stretched by it. Weights are computed in float64
    and rounded, as in precompute_coeffs and normalize_coeffs_8bpc of Pillow.

    Example 4 -> 2: the centers of the outputs are 1 and 3, the centers of the inputs .5, 1.5, 2.5 and 3.5, and the
    cubic is stretched by 2. Output 0 is the sum of .459, .459, .120 and -.037 of the inputs. These are the values of
    the cubic at .25, .25, .75 and 1.25, divided by their sum.
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
    """Resizes the columns, uint8[b, y, x, 3] -> uint8[b, y, out, 3], with the result of resampling_taps.

    int32 is enough. The weights of an output add up to 2**22, and their absolute values to at most 1.3 * 2**22, because
    the negative lobes of the cubic are small. 255 * 1.3 * 2**22 + 2**21 = 1.4e9 is below 2**31.
    """
    total = jnp.int32(1 << (PRECISION_BITS - 1))  # a half, so that the shift rounds
    for tap, weight in enumerate(weights.T):
        column = jnp.take(images, first + tap, axis=2, mode="clip")  # clipped indices have the weight 0
        total += column.astype(jnp.int32) * weight[:, None]
    return jnp.clip(total >> PRECISION_BITS, 0, 255).astype(jnp.uint8)
