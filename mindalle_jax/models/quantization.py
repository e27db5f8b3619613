"""Quantization: stores floating point numbers as int8 with one scale per row, in half the bytes of bfloat16.

The number of a row with the largest absolute value becomes 127 or -127, and zero stays zero ("absmax"): Dettmers et
al., "LLM.int8()", 2022, arXiv:2208.07339, section 2.1. Rows of a weight are its outputs, so the scale is applied after
the product: x (s W)^T = s (x W^T).
"""

from typing import Any, NamedTuple

import jax
import numpy as np


class Quantized(NamedTuple):
    """A quantized array: values * scale[..., None] is about the original array."""

    values: Any
    """int8[..., n] in [-127, 127]"""
    scale: Any
    """[...], of a floating dtype"""


def quantize(x: jax.Array | np.ndarray, dtype: Any) -> Quantized:
    """Quantizes each row (the last axis) of a floating point array [..., n]; scales are in `dtype`.

    It works on JAX and NumPy arrays. The error of a number is at most half a scale. The scale of a row with NaN or
    infinity is NaN or infinite too. Rows of zeros stay zeros.
    """
    xp: Any = x.__array_namespace__()
    x = x.astype("float32")
    # The scale is rounded to its dtype first, so that the values fit the rounded scale.
    scale = (xp.max(xp.abs(x), axis=-1) / 127).astype(dtype)
    divisor = xp.where(scale == 0, xp.ones_like(scale), scale).astype("float32")[..., None]
    return Quantized(xp.clip(xp.round(x / divisor), -127, 127).astype("int8"), scale)
