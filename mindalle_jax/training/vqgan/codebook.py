"""Rows of a codebook in training: where they start, and which of them are redundant.

Dimensions: n rows of width e, N features of a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

NEVER_USED = 1 << 30
"""The value of `unused` for the rows of a fresh codebook."""
FEATURES_PER_START = 16
"""Restarts at most one row per this many features in a batch, so that its effect counts before more follow."""


def starts_at_once(started: Any, num_features: int) -> Any:
    """How many rows can be set to features of a batch: as many as have started before, within bounds."""
    return jnp.clip(started, 1, max(1, num_features // FEATURES_PER_START))


def steps_to_fill(rows: int, num_features: int) -> int:
    """How many steps it takes until every row of a fresh codebook has started."""
    steps = started = 0
    while started < rows:
        started, steps = started + int(starts_at_once(started, num_features)), steps + 1
    return steps


def restarts(key: jax.Array, dead: jax.Array, features: jax.Array, errors: jax.Array) -> jax.Array:
    """f32[n, e]: for each row that is `dead` (bool[n]) another of the features [N, e], while there are enough.

    They are sampled with probabilities in proportion to `errors` [N]: mostly where images are worst. Over several
    steps that is the seeding of k-means|| (Bahmani et al. 2012, arXiv:1203.6402), with errors that can be seen.
    """
    order = jnp.argsort(-(jnp.log(errors) + jax.random.gumbel(key, errors.shape)))
    return features[order[(jnp.cumsum(dead) - 1) % len(features)]]


def redundant(codebook: jax.Array, distance: jax.Array) -> jax.Array:
    """bool[n]: rows of f32[n, e] whose squared distance from one before them is less than `distance`.

    Takes the memory of an array f32[n, n].
    """
    squares = jnp.sum(codebook**2, axis=1)
    apart = squares[:, None] + squares - 2 * jnp.einsum("ne,me->nm", codebook, codebook, precision="highest")
    return jnp.any(jnp.tril(apart < distance, -1), axis=1)


def perplexity(counts: jax.Array) -> jax.Array:
    """How many codes are in use: e to the entropy (nats) of their distribution, 1 to n. counts: int32[n]."""
    share = counts / jnp.maximum(jnp.sum(counts), 1)
    return jnp.exp(-jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.where(counts > 0, share, 1)), 0)))
