"""From logits to a code: temperature, top-k and top-p, and the draw among what they keep.

Every row has its own settings, and what it draws depends on these alone.

Dimensions: b rows, w positions, v vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """The settings of each row of a batch, arrays [b]: no change of a value compiles anything."""

    candidates: Any
    """int32: the number of the candidate, which its noise depends on"""
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
    """Temperature, then top-k, then top-p: logits [b, v] -> f32[b, v] with -inf for what is not to be drawn."""
    temperature = jnp.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
    logits = logits.astype(jnp.float32) / temperature
    logits = jnp.where(logits >= kth_largest(logits, rows.top_k[:, None]), logits, -jnp.inf)
    return jax.lax.cond(jnp.any(rows.top_p < 1), _top_p, lambda x, _: x, logits, rows.top_p[:, None])


def kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of each row of f32[b, v], [b, 1]; k is traced, int32 [] or [b, 1], 1 <= k <= v.

    Found digit by digit in base 2**n of its bits, exact: counts, where a sort of 16,384 takes many times as long on
    CPU and as many launches on GPU. On CPU digits are bits, in a loop; elsewhere a loop would be launched trip by trip
    outside of the graph of a step, and 8 digits of 4 bits take fewer launches.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floats: negative ones are mirrored, and all below the positive ones.
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    found = jax.lax.platform_dependent(ordered, k, cpu=_bit_by_bit, default=_digit_by_digit)
    return jax.lax.bitcast_convert_type(jnp.where(found >= sign, found ^ sign, ~found), jnp.float32)


def _bit_by_bit(ordered: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of each row of uint32[b, v], [b, 1]: 32 counts in a loop."""

    def refine(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        at_least = jnp.sum(ordered >= trial, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(at_least >= k, trial, found)

    return jax.lax.fori_loop(0, 32, refine, jnp.zeros((ordered.shape[0], 1), jnp.uint32))


def _digit_by_digit(ordered: jax.Array, k: jax.Array) -> jax.Array:
    """The same without a loop: 8 times 15 counts, of which XLA makes one kernel each time."""
    found = jnp.zeros((ordered.shape[0], 1), jnp.uint32)
    for shift in range(28, -1, -4):
        trials = [found | jnp.uint32(digit << shift) for digit in range(1, 16)]
        enough = [jnp.sum(ordered >= trial, axis=-1, keepdims=True, dtype=jnp.int32) >= k for trial in trials]
        digits = jnp.sum(jnp.stack(enough), axis=0, dtype=jnp.uint32)
        # A barrier: XLA would put each count into all that follow, and not come to an end.
        found = jax.lax.optimization_barrier(found | digits << jnp.uint32(shift))
    return found


def _top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps a code iff the probability of those before it, in descending order, is below p, [b, 1]; all at p = 1.

    p = 0.6, probabilities .2 .5 .1 .2: sorted .5 .2 .2 .1, before each 0 .5 .7 .9, so the ids 1 and 0 stay; of the two
    with .2 the lower id comes first.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(probs, axis=-1, stable=True, descending=True)
    mass = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    keep = jnp.put_along_axis(jnp.zeros_like(before, bool), order, before < p, axis=-1, inplace=False)
    # A row that is off must not depend on whether another one of its batch is on.
    return jnp.where(keep | (p == 1), logits, -jnp.inf)


def gumbel_noise(rows: Rows, positions: jax.Array, vocab_size: int) -> jax.Array:
    """The noise of each row at each position int32[w]: f32[b, w, v], or zeros where a row is greedy.

    The key is fold_in(fold_in(key(seed), candidate), position), whatever else is in the batch.
    """

    def noise(seed: jax.Array, candidate: jax.Array, t: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), candidate)
        return jax.random.gumbel(jax.random.fold_in(own, t), (vocab_size,), jnp.float32)

    each = jax.vmap(jax.vmap(noise, (None, None, 0)), (0, 0, None))
    greedy = (rows.temperature == 0)[:, None, None]
    return jnp.where(greedy, 0.0, each(rows.seeds, rows.candidates, positions))


def draw(logits: jax.Array, noise: jax.Array, rows: Rows) -> jax.Array:
    """Codes int32[b, w] from logits and gumbel_noise f32[b, w, v]: Gumbel-max over what the filters keep."""
    b, w, v = logits.shape
    each = Rows(*(None if setting is None else jnp.repeat(setting, w) for setting in rows))  # [b * w]
    kept = filter_logits(logits.reshape(b * w, v), each)
    return jnp.argmax(kept.reshape(logits.shape) + noise, axis=-1).astype(jnp.int32)
