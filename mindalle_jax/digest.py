"""Digests of arrays, computed where the arrays are: the same for any sharding, mesh and number of processes."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def digests(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """16 hexadecimal digits for each array, over its bits and their order; neither shape nor dtype enter."""
    lanes = jax.device_get({path: _lanes(leaf) for path, leaf in leaves.items()})
    return {path: "".join(f"{int(lane):08x}" for lane in pair) for path, pair in lanes.items()}


@jax.jit
def _lanes(array: jax.Array) -> tuple[jax.Array, ...]:
    """uint32[], one for each seed:

        lane(seed) = sum over i of mix(word[i] ^ mix(i ^ seed))  modulo 2**32

    word[i] is element i in C order as an unsigned number; elements of 8 bytes are two words, i is modulo 2**32. mix is
    a bijection that changes half of the bits for any change of its input. So a change within one word changes both
    lanes, always, and any other one (two elements exchanged, a block of zeros) goes unseen once in 2**64. A sum has no
    order, which is what lets every device do its part.
    """
    words = array.astype(jnp.uint8) if array.dtype == bool else array
    bits = min(8 * words.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(words, f"uint{bits}").astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    lanes = tuple(_mix(words ^ _mix(index ^ jnp.uint32(seed))) for seed in _SEEDS)
    # One reduction, not a sum for each lane: on CPU XLA fuses it with the mixing, which is ten times faster.
    zeros = (jnp.uint32(0),) * len(lanes)
    return jax.lax.reduce(lanes, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), range(words.ndim))


def _mix(x: jax.Array) -> jax.Array:
    """lowbias32 (Chris Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
