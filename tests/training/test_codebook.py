"""Where the rows of a codebook start, and which of them go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindalle_jax.training.codebook import (
    merge_rows,
    perplexity,
    redundant,
    restarts,
    starts_at_once,
    updates_to_fill,
)


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
    assert updates_to_fill(32, 512) == 6 and updates_to_fill(96, 512) == 8 and updates_to_fill(97, 512) == 9
    assert updates_to_fill(0, 512) == 0


def test_rows_near_one_in_more_use_go():
    """The most used of a group stays, whatever its place; order is kept; a chain is not one group."""
    codebook = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [9.0, 0.0], [9.0, 0.5]], np.float32)
    merged = merge_rows(codebook, np.array([1, 5, 3, 0, 2]), distance=1.1)
    np.testing.assert_array_equal(merged, codebook[[1, 4]])
    # From the first used most, 2 is too far away; 1 goes to either.
    np.testing.assert_array_equal(merge_rows(codebook, np.array([5, 1, 3, 0, 0]), distance=1.1), codebook[[0, 2, 3]])
    np.testing.assert_array_equal(merge_rows(codebook, np.arange(5), distance=0.0), codebook)


def test_rows_near_an_earlier_one_are_redundant():
    """The first of a group is not; squared distances, by the direct formula."""
    codebook = np.random.default_rng(0).random((60, 3), np.float32)
    apart = ((codebook[:, None] - codebook) ** 2).sum(axis=2)
    expected = np.array([bool((apart[i, :i] < 0.02).any()) for i in range(60)])
    assert 5 < expected.sum() < 55
    np.testing.assert_array_equal(redundant(jnp.asarray(codebook), jnp.float32(0.02)), expected)
    assert not np.any(redundant(jnp.asarray(codebook), jnp.float32(0.0)))


def test_features_find_a_row_as_near_as_that():
    """Of random features and rows: what is lost is at most the distance."""
    rng, distance = np.random.default_rng(0), 0.3
    codebook, features = rng.random((200, 3), np.float32), rng.random((500, 3), np.float32)
    merged = merge_rows(codebook, rng.integers(0, 9, 200), distance**2)
    nearest = [np.sqrt(((features[:, None] - rows) ** 2).sum(axis=2).min(axis=1)) for rows in (codebook, merged)]
    assert 5 < len(merged) < 100
    assert (nearest[1] <= nearest[0] + distance).all() and (nearest[1] > nearest[0]).any()
    apart = ((merged[:, None] - merged) ** 2).sum(axis=2)[~np.eye(len(merged), dtype=bool)]
    assert apart.min() >= distance**2


def test_perplexity_is_the_number_of_codes_in_even_use():
    assert perplexity(jnp.array([3, 3, 0, 3, 3])) == pytest.approx(4, rel=1e-6)
    assert perplexity(jnp.array([0, 9])) == pytest.approx(1, rel=1e-6)
    assert 1 < perplexity(jnp.array([1, 9])) < 2
    assert perplexity(jnp.zeros(3, jnp.int32)) == pytest.approx(1)
