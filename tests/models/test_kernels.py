"""The kernel in Pallas, interpreted, against its definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformer_helpers import decode_jit, random_inputs, small

from mindalle_jax.models.kernels import BLOCK, decode_attention
from mindalle_jax.models.quantization import Quantized, quantize
from mindalle_jax.models.transformer import Transformer, unstack_blocks

B, H, P, T, K = 2, 3, 5, 100, 8
"""Rows, heads, positions of the prefix and of the cache, width of a head. Neither P nor T is a whole block."""


def values_of(x) -> np.ndarray:
    """f64 of an array, or of int8 values and their scales."""
    if isinstance(x, Quantized):
        return np.asarray(x.values, np.float64) * np.asarray(x.scale, np.float64)[..., None]
    return np.asarray(x, np.float64)


def expected_attention(q, new, prefix, cache, t: int) -> np.ndarray:
    """By the definition, f64[b, h, k]: softmax over the prefix, positions 0..t-1 of the cache, and the new one."""
    (new_k, new_v), (prefix_k, prefix_v), (old_k, old_v) = (
        tuple(map(values_of, pair)) for pair in (new, prefix, cache)
    )
    out = np.zeros((B, H, K))
    for b in range(B):
        for h in range(H):
            keys = np.concatenate([prefix_k[h], old_k[b, h, :t], new_k[b, h, None]])
            values = np.concatenate([prefix_v[h], old_v[b, h, :t], new_v[b, h, None]])
            scores = keys @ np.asarray(q[b, h], np.float64) * K**-0.5
            weights = np.exp(scores - scores.max())
            out[b, h] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_the_kernel_is_its_definition_wherever_a_block_ends(int8):
    """One program for all positions. What lies at t and beyond is NaN here: it is neither read nor lost."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    quantized = (lambda x: quantize(x, np.float32)) if int8 else lambda x: x
    q, prefix = draw(B, H, K), (draw(H, P, K), draw(H, P, K))
    new = tuple(quantized(draw(B, H, K)) for _ in "kv")
    step = jax.jit(partial(decode_attention, interpret=True))
    for t in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, T - 1):
        beyond = [draw(B, H, T, K) for _ in "kv"]
        cache = tuple(quantized(x) for x in beyond)
        for x in cache:
            (x.scale if int8 else x)[:, :, t:] = np.nan
        out, filled = step(q, new, prefix, cache, jnp.int32(t))
        # Sums of at most 106 products of order one, a quotient of them: some 1e-6 in float32.
        np.testing.assert_allclose(out, expected_attention(q, new, prefix, cache, t), rtol=0, atol=1e-5)
        for before, after, latest in zip(*map(jax.tree.leaves, (cache, filled, new)), strict=True):
            before[:, :, t] = latest
            np.testing.assert_array_equal(after, before)


def test_the_kernel_gives_the_dtype_of_the_query():
    """The softmax is in float32; bfloat16 is rounded once, at the end: half of 2**-8 of values of order one."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    q, new = draw(B, H, K), (draw(B, H, K), draw(B, H, K))
    prefix, cache = (draw(H, P, K), draw(H, P, K)), (draw(B, H, T, K), draw(B, H, T, K))
    out, filled = jax.jit(partial(decode_attention, interpret=True))(q, new, prefix, cache, jnp.int32(70))
    assert out.dtype == jnp.bfloat16 and {leaf.dtype for leaf in filled} == {jnp.dtype(jnp.bfloat16)}
    expected = expected_attention(q, new, prefix, cache, 70)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("int8_cache", [False, True])
def test_the_pallas_kernel_below_the_two_prefixes_of_guidance(random_params, int8_cache):
    """vmap gives the kernel another axis, the cache that it fills in place too."""
    config = small("text")
    params = unstack_blocks(random_params(config, "stage2"))
    prefix_ids, codes = random_inputs(config, 2)
    found = {}
    for attention in ("xla", "pallas"):
        model = Transformer(config.stage2, stacked=False, attention=attention, int8_cache=int8_cache)
        both = jax.vmap(lambda ids, model=model: decode_jit(model, params, ids, codes, 1))
        with jax.default_matmul_precision("highest"):
            found[attention] = both(prefix_ids)
    assert np.abs(found["xla"][0] - found["xla"][1]).max() > 1e-3
    np.testing.assert_allclose(found["pallas"], found["xla"], rtol=0, atol=2e-5)
