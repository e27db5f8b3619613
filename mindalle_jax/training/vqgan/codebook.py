"""What becomes of the rows of a codebook in training: where they start, and which of them are redundant.

Dimensions: n rows of width e, N features of a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

NEVER_USED = 1 << 30
"""`unused` of the rows of a fresh codebook."""
FEATURES_PER_START = 16
"""Of so many features of a batch at most one becomes a row: what it improves counts before others follow."""


def starts_at_once(started: Any, num_features: int) -> Any:
    """How many rows can be set to features of a batch that has so many: as many again as have started before."""
    return jnp.clip(started, 1, max(1, num_features // FEATURES_PER_START))


def updates_to_fill(rows: int, num_features: int) -> int:
    """How many updates it takes until every row of a fresh codebook has started."""
    updates = started = 0
    while started < rows:
        started, updates = started + int(starts_at_once(started, num_features)), updates + 1
    return updates


def restarts(key: jax.Array, dead: jax.Array, features: jax.Array, errors: jax.Array) -> jax.Array:
    """f32[n, e]: for each row that is `dead` (bool[n]) another of the features [N, e], while there are enough.

    They are drawn with probabilities in proportion to `errors` [N]: mostly where pictures are worst. Over several
    updates that is the seeding of k-means|| (Bahmani et al. 2012, arXiv:1203.6402), with errors that can be seen.
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
