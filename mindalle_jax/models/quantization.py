"""int8 in place of floating point, with one scale a row: half the bytes of bfloat16.

The largest number of a row becomes 127 or -127 and zero stays zero ("absmax"): Dettmers et al., "LLM.int8()", 2022,
arXiv:2208.07339, section 2.1. Rows of a weight are its outputs, so a scale goes behind the product:
x (s W)^T = s (x W^T).
"""

from typing import Any, NamedTuple

import jax
import numpy as np


class Quantized(NamedTuple):
    """values * scale[..., None] is what was there."""

    values: Any
    """int8[..., n] in [-127, 127]"""
    scale: Any
    """of a floating dtype, [...]"""


def quantize(x: jax.Array | np.ndarray, dtype: Any) -> Quantized:
    """Each row [..., n] (the last axis) of floating point by itself, on the device or in NumPy, with scales in `dtype`.

    Off by at most half a scale; a row that holds NaN or infinity has such a scale. Rows of zeros stay zeros.
    """
    xp: Any = x.__array_namespace__()
    x = x.astype("float32")
    # Rounded to its dtype first, so that the values make up for it.
    scale = (xp.max(xp.abs(x), axis=-1) / 127).astype(dtype)
    divisor = xp.where(scale == 0, xp.ones_like(scale), scale).astype("float32")[..., None]
    return Quantized(xp.clip(xp.round(x / divisor), -127, 127).astype("int8"), scale)
