"""From logits to a code: temperature, top-k, top-p, and sampling among the codes that they keep.

Every row has its own settings. The codes of a row depend only on its logits and its settings.

Dimensions: b rows, w positions, v vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """The settings of each row of a batch, as arrays [b]. So a new value needs no new compilation."""

    candidates: Any
    """int32: the number of the candidate, on which its noise depends"""
    seeds: Any
    """uint32"""
    temperature: Any
    """f32; 0 is greedy"""
    top_k: Any
    """int32 in [1, v]; v is off"""
    top_p: Any
    """f32 in (0, 1]; 1 is off"""
    guidance_scale: Any
    """f32; None in a batch without guidance"""


def filter_logits(logits: jax.Array, rows: Rows) -> jax.Array:
    """Applies temperature, then top-k, then top-p to logits [b, v]. Returns f32[b, v] with -inf for excluded codes."""
    temperature = jnp.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
    logits = logits.astype(jnp.float32) / temperature
    logits = jnp.where(logits >= kth_largest(logits, rows.top_k[:, None]), logits, -jnp.inf)
    return jax.lax.cond(jnp.any(rows.top_p < 1), _top_p, lambda x, _: x, logits, rows.top_p[:, None])


def kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """Returns f32[b, 1]: the k-th largest number of each row of f32[b, v]. k is int32 [] or [b, 1], with 1 <= k <= v.

    The result is exact. Its bits are found digit by digit, from the highest, by counting the numbers that are at least
    a trial value. A sort of 16,384 numbers takes many times as long on CPU, and many more launches on GPU. On CPU a
    digit is one bit, and a loop runs over the bits. On other backends every pass of a loop would be launched by itself,
    outside of the graph of a step; there 8 digits of 4 bits without a loop take fewer launches.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floats: negative floats are mirrored and come below the positive ones.
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    found = jax.lax.platform_dependent(ordered, k, cpu=_bit_by_bit, default=_digit_by_digit)
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)


def _bit_by_bit(ordered: jax.Array, k: jax.Array) -> jax.Array:
    """Returns uint32[b, 1]: the k-th largest number of each row of uint32[b, v], by 32 counts in a loop."""

    def refine(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        at_least = jnp.sum(ordered >= trial, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(at_least >= k, trial, found)

    return jax.lax.fori_loop(0, 32, refine, jnp.zeros((ordered.shape[0], 1), jnp.uint32))


def _digit_by_digit(ordered: jax.Array, k: jax.Array) -> jax.Array:
    """Works as _bit_by_bit, without a loop: it counts 8 times, each time 15 trial values in one kernel."""
    found = jnp.zeros((ordered.shape[0], 1), jnp.uint32)
    for shift in range(28, -1, -4):
        trials = [found | jnp.uint32(digit << shift) for digit in range(1, 16)]
        enough = [jnp.sum(ordered >= trial, axis=-1, keepdims=True, dtype=jnp.int32) >= k for trial in trials]
        digits = jnp.sum(jnp.stack(enough), axis=0, dtype=jnp.uint32)
        # Without a barrier XLA copies each count into all later ones, and its compilation does not end.
        found = jax.lax.optimization_barrier(found | digits << jnp.uint32(shift))
    return found


def _top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps a code if the sum of the higher probabilities is below p, [b, 1]. At p = 1 it keeps all codes.

    Example: p = 0.6, probabilities .2 .5 .1 .2. Sorted they are .5 .2 .2 .1, and the sums before them are 0 .5 .7 .9.
    So the codes with ids 1 and 0 stay. Of two equal probabilities the one with the lower id comes first.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(probs, axis=-1, stable=True, descending=True)
    mass = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    keep = jnp.put_along_axis(jnp.zeros_like(before, bool), order, before < p, axis=-1, inplace=False)
    # A row with top-p off must not change if another row of its batch uses top-p.
    return jnp.where(keep | (p == 1), logits, -jnp.inf)


def gumbel_noise(rows: Rows, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Returns f32[b, w, v]: the noise of each row at each of the positions int32[w]; zeros for greedy rows.

    Its key is fold_in(fold_in(key(seed), candidate), position), so it does not depend on the rest of the batch.
    """

    def noise(seed: jax.Array, candidate: jax.Array, t: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), candidate)
        return jax.random.gumbel(jax.random.fold_in(own, t), (vocab_size,), jnp.float32)

    each = jax.vmap(jax.vmap(noise, (None, None, 0)), (0, 0, None))
    greedy = (rows.temperature == 0)[:, None, None]
    return jnp.where(greedy, 0.0, each(rows.seeds, rows.candidates, positions))


def draw(logits: jax.Array, noise: jax.Array, rows: Rows) -> jax.Array:
    """Samples codes int32[b, w] from logits and gumbel_noise f32[b, w, v]: Gumbel-max over the codes that stay."""
    b, w, v = logits.shape
    each = Rows(*(None if setting is None else jnp.repeat(setting, w) for setting in rows))  # [b * w]
    kept = filter_logits(logits.reshape(b * w, v), each)
    return jnp.argmax(kept.reshape(logits.shape) + noise, axis=-1).astype(jnp.int32)
