"""A kernel for NVIDIA GPUs in Pallas for Triton: it computes the attention of a decoding step in one launch per layer.

On a GPU the launches of a decoding step take as long as its reads from memory (docs/log.md, Programs for an H100).
Without a GPU the kernel runs only with `interpret=True`, as in the tests. JAX marks its Triton backend as deprecated
since 0.12, so nothing depends on this file: attention.py computes the same in XLA, and imports this only on request.

Dimensions: b batch, h heads, p prefix length, t image positions, k head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

BLOCK = 64
"""Number of cache positions that are read at once."""


def decode_attention(
    q: jax.Array, new: Any, prefix: Any, cache: Any, t: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, Any]:
    """Writes position t into the cache, in place, and computes attention over the prefix and the positions 0..t.

    q: [b, h, k]. new, prefix, cache: pairs of keys and values, [b, h, k], [h, p, k] and [b, h, t, k]. In a quantized
    cache, and then also in `new`, keys and values are pairs of int8 values and scales [b, h, t]. Returns [b, h, k] and
    the cache. Positions after t are not read. Each candidate and head has one program. The softmax is computed online,
    in float32: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
    """
    b, h, width = q.shape
    leaves, structure = jax.tree.flatten(cache)
    count = len(leaves)  # 2, or 4: values and scales of keys, then of values
    prefix_length = prefix[0].shape[1]
    padded_length = pl.next_power_of_2(prefix_length)  # Triton has only powers of two
    prefix = [jnp.pad(x, ((0, 0), (0, padded_length - prefix_length), (0, 0))) for x in prefix]

    def kernel(t_ref: Any, q_ref: Any, *refs: Any) -> None:
        i, j, t = pl.program_id(0), pl.program_id(1), t_ref[...]
        new_refs, (pk_ref, pv_ref), olds = refs[:count], refs[count : count + 2], refs[count + 2 : 2 * count + 2]
        out_ref, filled = refs[2 * count + 2], refs[2 * count + 3 :]
        q = q_ref[...].astype(jnp.float32) * width**-0.5
        for new_ref, ref in zip(new_refs, filled, strict=True):
            if len(ref.shape) == 4:
                ref[i, j, t, :] = new_ref[...]
            else:
                ref[i, j, t] = new_ref[...]

        def numbers(parts: list[jax.Array]) -> jax.Array:
            x = parts[0].astype(jnp.float32)
            return x * parts[1].astype(jnp.float32)[..., None] if len(parts) == 2 else x

        half = count // 2
        latest = [ref[...] for ref in new_refs]
        # The new position comes first. It always exists, so the largest score is never -inf.
        top = jnp.sum(numbers(latest[:half]) * q)
        carry = top, jnp.float32(1.0), numbers(latest[half:])

        def attend(carry: Any, keys: jax.Array, values: jax.Array, there: jax.Array) -> Any:
            top, total, acc = carry
            scores = jnp.where(there, jnp.sum(keys * q[None], axis=1), -jnp.inf)
            higher = jnp.maximum(top, jnp.max(scores))
            shrink, weights = jnp.exp(top - higher), jnp.exp(scores - higher)
            return higher, total * shrink + jnp.sum(weights), acc * shrink + jnp.sum(weights[:, None] * values, axis=0)

        keys, values = pk_ref[...].astype(jnp.float32), pv_ref[...].astype(jnp.float32)
        carry = attend(carry, keys, values, jnp.arange(padded_length) < prefix_length)

        def block(n: jax.Array, carry: Any) -> Any:
            rows = n * BLOCK + jnp.arange(BLOCK)
            there, at = rows < t, pl.ds(n * BLOCK, BLOCK)
            parts = [
                plt.load(ref.at[i, j, at, :], mask=there[:, None], other=0)
                if len(ref.shape) == 4
                else plt.load(ref.at[i, j, at], mask=there, other=0)
                for ref in olds
            ]
            return attend(carry, numbers(parts[:half]), numbers(parts[half:]), there)

        _, total, acc = jax.lax.fori_loop(0, pl.cdiv(t, BLOCK), block, carry)
        out_ref[...] = (acc / total).astype(out_ref.dtype)

    vector = pl.BlockSpec((None, None, width), lambda i, j: (i, j, 0))
    scalar = pl.BlockSpec((None, None), lambda i, j: (i, j))
    head = pl.BlockSpec((None, padded_length, width), lambda i, j: (j, 0, 0))
    whole = [pl.BlockSpec(leaf.shape, lambda i, j, n=leaf.ndim: (0,) * n) for leaf in leaves]
    attended, *filled = pl.pallas_call(
        kernel,
        grid=(b, h),
        in_specs=[
            pl.BlockSpec((), lambda i, j: ()),
            vector,
            *(vector if leaf.ndim == 4 else scalar for leaf in leaves),
            head,
            head,
            *whole,
        ],
        out_specs=[vector, *whole],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves),
        ],
        input_output_aliases={4 + count + n: 1 + n for n in range(count)},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(t.astype(jnp.int32), q, *jax.tree.leaves(new), *prefix, *leaves)
    return attended, jax.tree.unflatten(structure, filled)
