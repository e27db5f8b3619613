"""Rows of a codebook during training: where they start, and which rows are redundant.

Dimensions: n rows of width e, N features of a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

NEVER_USED = 1 << 30
"""The value of `unused` for the rows of a fresh codebook."""
FEATURES_PER_START = 16
"""A step starts at most one row per this many features in its batch. So these rows take effect before more start."""


def starts_at_once(started: Any, num_features: int) -> Any:
    """Returns int32[]: how many rows may start in a step.

    As many rows may start as have started before, but at least 1 and at most num_features / FEATURES_PER_START.
    """
    return jnp.clip(started, 1, max(1, num_features // FEATURES_PER_START))


def steps_to_fill(rows: int, num_features: int) -> int:
    """Returns the number of steps until every row of a fresh codebook has started."""
    steps = started = 0
    while started < rows:
        started, steps = started + int(starts_at_once(started, num_features)), steps + 1
    return steps


def restarts(key: jax.Array, dead: jax.Array, features: jax.Array, errors: jax.Array) -> jax.Array:
    """Returns f32[n, e]: a feature for each row that is `dead` (bool[n]); the other rows hold no meaning.

    Each dead row gets a different one of the features f32[N, e], if there are enough. Features are sampled with
    probabilities in proportion to `errors` f32[N], so mostly where images are worst. Over several steps this is the
    seeding of k-means|| (Bahmani et al. 2012, arXiv:1203.6402), with the error in pixels as the distance.
    """
    order = jnp.argsort(-(jnp.log(errors) + jax.random.gumbel(key, errors.shape)))
    return features[order[(jnp.cumsum(dead) - 1) % len(features)]]


def redundant(codebook: jax.Array, distance: jax.Array) -> jax.Array:
    """Returns bool[n]: whether the squared distance of a row of f32[n, e] from an earlier row is less than `distance`.

    It takes the memory of an array f32[n, n].
    """
    squares = jnp.sum(codebook**2, axis=1)
    apart = squares[:, None] + squares - 2 * jnp.einsum("ne,me->nm", codebook, codebook, precision="highest")
    return jnp.any(jnp.tril(apart < distance, -1), axis=1)


def perplexity(counts: jax.Array) -> jax.Array:
    """Returns f32[]: the effective number of codes in use, 1 to n, which is exp(entropy) of their distribution.

    counts: int32[n] or f32[n], how often each code was used.
    """
    share = counts / jnp.maximum(jnp.sum(counts), 1)
    return jnp.exp(-jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.where(counts > 0, share, 1)), 0)))
