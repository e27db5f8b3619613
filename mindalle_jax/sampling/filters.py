"""From logits to a code: temperature, top-k and top-p, and the draw among what they keep.

Dimensions: b rows, w positions, v vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TracedSettings(NamedTuple):
    """Scalars of the compiled loop. Off is top_k = v and top_p = 1."""

    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any
    guidance_scale: Any


def filter_logits(logits: jax.Array, settings: TracedSettings) -> jax.Array:
    """Temperature, then top-k, then top-p: logits [b, v] -> f32[b, v] with -inf for what is not to be drawn."""
    temperature = jnp.where(settings.temperature == 0, 1.0, settings.temperature)
    logits = logits.astype(jnp.float32) / temperature
    logits = jnp.where(logits >= kth_largest(logits, settings.top_k), logits, -jnp.inf)
    return jax.lax.cond(settings.top_p < 1, _top_p, lambda x, _: x, logits, settings.top_p)


def kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of each row of f32[b, v], [b, 1]; k is traced, 1 <= k <= v.

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
    """Keeps a code iff the probability of those before it, in descending order, is below p.

    p = 0.6, probabilities .2 .5 .1 .2: sorted .5 .2 .2 .1, before each 0 .5 .7 .9, so the ids 1 and 0 stay; of the two
    with .2 the lower id comes first.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(probs, axis=-1, stable=True, descending=True)
    mass = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    keep = jnp.put_along_axis(jnp.zeros_like(before, bool), order, before < p, axis=-1, inplace=False)
    return jnp.where(keep, logits, -jnp.inf)


def gumbel_noise(candidates: jax.Array, positions: jax.Array, vocab_size: int, settings: TracedSettings) -> jax.Array:
    """Of each candidate int32[b] at each position int32[w]: f32[b, w, v], or zeros where the draw is greedy."""
    key = jax.random.key(settings.seed, impl="threefry2x32")

    def noise(candidate: jax.Array, t: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, candidate), t)
        return jax.random.gumbel(own, (vocab_size,), jnp.float32)

    each = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))
    return jnp.where(settings.temperature == 0, 0.0, each(candidates, positions))


def draw(logits: jax.Array, noise: jax.Array, settings: TracedSettings) -> jax.Array:
    """Codes int32[b, w] from logits and gumbel_noise f32[b, w, v]: Gumbel-max over what the filters keep."""
    flat = logits.reshape(-1, logits.shape[-1])
    return jnp.argmax(filter_logits(flat, settings).reshape(logits.shape) + noise, axis=-1).astype(jnp.int32)
