"""Attention of one decoding step: the seam that faster kernels go behind.

Dimensions: b batch (candidates of one prompt), w positions fed at once, h heads, k head width, p prefix length,
t image positions.

All candidates of a prompt share the keys and values of its prefix, which are stored once, without a batch axis; each
candidate has its own for the picture drawn so far.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KV(NamedTuple):
    """Keys and values of one layer: [h, p, k] for a shared prefix, [b, h, t, k] for the cache of the candidates."""

    k: jax.Array
    v: jax.Array


def empty_cache(batch: int, n_heads: int, length: int, head_dim: int, dtype: jnp.dtype) -> KV:
    """Room for `length` image positions of `batch` candidates in one layer."""
    shape = (batch, n_heads, length, head_dim)
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def decode_attention_xla(q: jax.Array, new: KV, prefix: KV, cache: KV, t: jax.Array) -> tuple[jax.Array, KV]:
    """Puts positions t..t+w-1 into the cache; each attends to the prefix and to all positions up to itself.

    q and new.k, new.v are [b, w, h, k]; returns ([b, w, h, k], cache). The softmax is in float32. The whole cache is
    read, and what lies beyond is masked: with w = 1, t = 1 of 4 positions and a prefix of 2 the columns are

        prefix 0, prefix 1 | position 0, position 1, masked, masked
    """
    cache = _put(cache, new, t)
    prefix_length, scale = prefix.k.shape[1], q.shape[-1] ** -0.5
    shared = jnp.einsum("bwhk,hpk->bhwp", q, prefix.k, preferred_element_type=jnp.float32)
    own = jnp.einsum("bwhk,bhtk->bhwt", q, cache.k, preferred_element_type=jnp.float32)
    own = jnp.where(_visible(q, cache, t), own, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1) * scale, axis=-1).astype(q.dtype)
    from_prefix = jnp.einsum("bhwp,hpk->bwhk", weights[..., :prefix_length], prefix.v)
    return from_prefix + jnp.einsum("bhwt,bhtk->bwhk", weights[..., prefix_length:], cache.v), cache


def decode_attention_reference(q: jax.Array, new: KV, prefix: KV, cache: KV, t: jax.Array) -> tuple[jax.Array, KV]:
    """The same by the definition: a private copy of the prefix in front of each candidate's keys, one plain softmax."""
    cache = _put(cache, new, t)

    def whole(shared: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(shared, (q.shape[0], *shared.shape)), own], axis=2)[:, :, None]

    keys, values = whole(prefix.k, cache.k), whole(prefix.v, cache.v)  # [b, h, 1, p + t, k]
    scores = jnp.sum(q.swapaxes(1, 2)[:, :, :, None] * keys, axis=-1).astype(jnp.float32) * q.shape[-1] ** -0.5
    visible = jnp.pad(_visible(q, cache, t), ((0, 0), (prefix.k.shape[1], 0)), constant_values=True)
    weights = jax.nn.softmax(scores, axis=-1, where=visible)
    return jnp.sum(weights[..., None] * values, axis=3).swapaxes(1, 2).astype(q.dtype), cache


def _put(cache: KV, new: KV, t: jax.Array) -> KV:
    at = (0, 0, t, 0)
    return KV(*(jax.lax.dynamic_update_slice(old, x.swapaxes(1, 2), at) for old, x in zip(cache, new, strict=True)))


def _visible(q: jax.Array, cache: KV, t: jax.Array) -> jax.Array:
    """bool[w, t]: which positions of the picture each of the positions fed attends to."""
    return jnp.arange(cache.k.shape[2]) <= t + jnp.arange(q.shape[1])[:, None]


DECODE_ATTENTION: dict[str, Callable[[jax.Array, KV, KV, KV, jax.Array], tuple[jax.Array, KV]]] = {
    "xla": decode_attention_xla,
    "reference": decode_attention_reference,
}
"""The backends by name."""
