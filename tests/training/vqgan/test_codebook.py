"""Where the rows of a codebook start, and which of them go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindalle_jax.training.vqgan.codebook import perplexity, redundant, restarts, starts_at_once, steps_to_fill


def test_restarts_are_drawn_where_pictures_are_worst():
    """In proportion to the squared error: where there is none no code starts."""
    features = jnp.arange(4.0)[:, None]
    dead, errors = jnp.array([True, False, True]), jnp.array([0.0, 1.0, 0.0, 3.0])
    first = [float(restarts(jax.random.key(seed), dead, features, errors)[0, 0]) for seed in range(200)]
    assert set(first) == {1.0, 3.0} and 120 < first.count(3.0) < 180
    rows = np.asarray(restarts(jax.random.key(0), dead, features, errors))
    assert {rows[0, 0], rows[2, 0]} == {1.0, 3.0}


def test_a_fresh_codebook_fills_by_doubling():
    """Up to a sixteenth of the features of a batch, and one at least."""
    assert [int(starts_at_once(started, 512)) for started in (0, 1, 2, 16, 32, 500)] == [1, 1, 2, 16, 32, 32]
    assert int(starts_at_once(4, 3)) == 1
    # 1, 2, 4, 8, 16, 32 rows after six updates, then 32 at a time.
    assert steps_to_fill(32, 512) == 6 and steps_to_fill(96, 512) == 8 and steps_to_fill(97, 512) == 9
    assert steps_to_fill(0, 512) == 0


def test_rows_near_an_earlier_one_are_redundant():
    """The first of a group is not; squared distances, by the direct formula."""
    codebook = np.random.default_rng(0).random((60, 3), np.float32)
    apart = ((codebook[:, None] - codebook) ** 2).sum(axis=2)
    expected = np.array([bool((apart[i, :i] < 0.02).any()) for i in range(60)])
    assert 5 < expected.sum() < 55
    np.testing.assert_array_equal(redundant(jnp.asarray(codebook), jnp.float32(0.02)), expected)
    assert not np.any(redundant(jnp.asarray(codebook), jnp.float32(0.0)))


def test_perplexity_is_the_number_of_codes_in_even_use():
    assert perplexity(jnp.array([3, 3, 0, 3, 3])) == pytest.approx(4, rel=1e-6)
    assert perplexity(jnp.array([0, 9])) == pytest.approx(1, rel=1e-6)
    assert 1 < perplexity(jnp.array([1, 9])) < 2
    assert perplexity(jnp.zeros(3, jnp.int32)) == pytest.approx(1)
