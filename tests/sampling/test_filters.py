"""Filters, noise and draws: what is kept, how often it is drawn, and what a draw depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sampling_helpers import settings_of

from mindalle_jax.sampling import filters
from mindalle_jax.sampling.filters import Rows, draw, filter_logits, gumbel_noise, kth_largest
from mindalle_jax.sampling.generate import request_rows


def rows_of(count: int, vocab_size: int, **settings) -> Rows:
    """The same settings for candidates 0..count-1."""
    options = settings_of(vocab_size, **settings)
    options = dataclasses.replace(options, num_candidates=count, prompts=("",))
    return request_rows(options, np.zeros((1, 1), np.int32), vocab_size, 1).rows


# ---------------------------------------- filters


def expected_probs(logits: np.ndarray, temperature=1.0, top_k=None, top_p=None) -> np.ndarray:
    """The definition, a row at a time in float64: temperature, top-k with ties, softmax, top-p by a stable sort."""
    result = np.zeros(logits.shape)
    for row, out in zip((logits / np.float32(temperature)).astype(np.float64), result, strict=True):
        kept = np.ones(len(row), bool) if top_k is None else row >= np.sort(row)[-top_k]
        probs = np.where(kept, np.exp(row - row.max()), 0)
        probs /= probs.sum()
        mass = 0.0
        for token in sorted(range(len(row)), key=lambda i: (-probs[i], i)):
            if top_p is None or mass < top_p:
                out[token] = probs[token]
            # float32 sums could fall on the other side of p; no case below is that close.
            mass += probs[token]
            assert top_p is None or abs(mass - top_p) > 1e-6
        out /= out.sum()
    return result


@jax.jit
def _actual(logits, traced):
    return jax.nn.softmax(filter_logits(logits, traced), axis=-1)


def actual_probs(logits: np.ndarray, **settings) -> np.ndarray:
    """Of f32[b, v] with b <= 16, v <= 40. What is missing is masked, so that all cases share one compiled program."""
    b, v = logits.shape
    padded = np.zeros((16, 40), np.float32)
    padded[:, v:] = -np.inf
    padded[:b, :v] = logits
    return np.asarray(_actual(padded, rows_of(16, 40, **settings)))[:b, :v]


def hard_logits() -> np.ndarray:
    """f32[16, 40]: random rows, rows of few different values (many ties), a flat one, large and negative ones."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 3, (16, 40))
    rows[4:10] = rng.integers(-2, 3, (6, 40))
    rows[10] = 0
    rows[11] *= 100
    rows[12] -= 1000
    rows[13, ::2] = rows[13].max()  # twenty tie at the top
    return rows.astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 7.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 39},
        {"top_k": 40},
        {"top_p": 0.123},
        {"top_p": 0.777},
        {"top_p": 0.99983},
        {"top_k": 13, "top_p": 0.61234},
        {"top_k": 3, "top_p": 0.512345, "temperature": 0.9},
        {"top_k": 30, "top_p": 0.91234, "temperature": 2.5},
    ],
    ids=str,
)
def test_filters_follow_the_definition(settings):
    """Order (temperature, top-k, top-p on what is left) and ties: one of them wrong changes which codes can occur."""
    logits = hard_logits()
    expected, probs = expected_probs(logits, **settings), actual_probs(logits, **settings)
    np.testing.assert_array_equal(probs > 1e-37, expected > 1e-37)  # float32 ends there
    # XLA divides by multiplying with 1 / temperature: two roundings of the largest logit, beside 1e-6 for the rest.
    largest = np.abs(logits / np.float32(settings.get("temperature", 1))).max(axis=-1)
    assert (np.abs(probs - expected).max(axis=-1) < 1e-6 + 2 * np.spacing(largest)).all()


def test_ties_with_the_last_of_the_top_k_stay():
    """3 2 2 2 1 at k = 2 keeps four codes, as the original's `logits < kth` does; a sort-and-cut would keep two."""
    probs = actual_probs(np.array([[3, 2, 2, 2, 1]], np.float32), top_k=2)
    np.testing.assert_array_equal(probs[0] > 0, [True, True, True, True, False])


def test_top_p_takes_the_lower_id_among_equals():
    """The example of the docstring: p = 0.6 of .2 .5 .1 .2 keeps the ids 1 and 0."""
    logits = np.log(np.array([[0.2, 0.5, 0.1, 0.2]], np.float32))
    np.testing.assert_allclose(actual_probs(logits, top_p=0.6)[0], [2 / 7, 5 / 7, 0, 0], atol=1e-6)


def test_top_p_stops_where_the_mass_is_reached():
    """Strictly below p: four codes of exactly 1/4 (exact in float32 too) and p = 1/2 leave two, not three."""
    probs = actual_probs(np.zeros((1, 4), np.float32), top_p=0.5)
    np.testing.assert_array_equal(probs[0], [0.5, 0.5, 0, 0])


def test_a_tiny_top_p_keeps_the_most_likely_code():
    """Never nothing: an empty set would turn into NaN or code 0. Among equals it is the lowest id."""
    logits = hard_logits()
    probs = actual_probs(logits, top_p=1e-30)
    np.testing.assert_array_equal(probs.argmax(axis=-1), logits.argmax(axis=-1))
    np.testing.assert_array_equal(probs.max(axis=-1), 1)


def test_off_is_off():
    """top_k = v and top_p = 1 are the same as None, bit by bit."""
    logits = hard_logits()
    np.testing.assert_array_equal(actual_probs(logits, top_k=40, top_p=1.0), actual_probs(logits))


def test_minus_infinity_is_never_kept_beside_a_finite_logit():
    """Masked codes must not come back through a top-k larger than what is left."""
    logits = np.array([[1.0, -np.inf, 0.0, -np.inf]], np.float32)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.999}, {"temperature": 5.0}):
        assert (actual_probs(logits, **settings)[0, [1, 3]] == 0).all(), settings


@pytest.mark.parametrize("digits", [False, True], ids=["by bits, as on CPU", "by digits, as elsewhere"])
def test_kth_largest_is_exact(digits, monkeypatch):
    """Every k of rows with both signs, both zeros, infinities, denormals and duplicates: the bits of the sorted row."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (12, 33)).astype(np.float32)
    x[1] = -np.abs(x[1])
    x[2, ::3] = -np.inf
    x[3] = rng.integers(-1, 2, 33)
    x[4] = np.where(rng.integers(2, size=33), 0.0, -0.0)
    x[5, :7] = np.inf
    x[6] *= np.float32(1e-41)  # denormal
    x[7] *= np.float32(5e37)
    x[8] = -np.inf
    x[9, 4] = x[9].max()
    x[10] = x[10, 0]
    x[11] = np.where(rng.integers(2, size=33), x[11], np.round(x[11]))
    if digits:
        monkeypatch.setattr(filters, "_bit_by_bit", filters._digit_by_digit)
    found = np.asarray(
        jax.jit(jax.vmap(lambda x, k: kth_largest(x, k), in_axes=(None, 0)))(x, np.arange(1, 34, dtype=np.int32))
    )
    np.testing.assert_array_equal(found[..., 0], np.sort(x, axis=-1)[:, ::-1].T)


def test_digits_compile_for_many_rows_of_few_codes():
    """A compiler that puts each count into all that follow does not come to an end."""
    ordered = np.random.default_rng(0).integers(0, 2**32, (4096, 8), dtype=np.uint32)
    found = jax.jit(filters._digit_by_digit)(ordered, np.int32(3))
    np.testing.assert_array_equal(found[:, 0], np.sort(ordered, axis=-1)[:, -3])


# ---------------------------------------- draws


CANDIDATES = 4096


@jax.jit
def _draws(logits, positions, rows):
    logits = jnp.broadcast_to(logits, (CANDIDATES, len(positions), 8))
    return draw(logits, gumbel_noise(rows, positions, 8), rows).T


def draws(logits, candidates=(), positions=(0, 1), **settings) -> np.ndarray:
    """int32[2, 4096]: draws of two positions from one row of 8 logits; `candidates` replaces the first of 0..4095."""
    numbers = np.arange(CANDIDATES, dtype=np.int32)
    numbers[: len(candidates)] = candidates
    rows = rows_of(CANDIDATES, 8, **settings)._replace(candidates=numbers)
    with jax.threefry_partitionable(True):
        return np.asarray(_draws(np.asarray(logits, np.float32), np.asarray(positions, np.int32), rows))


LOGITS = np.array([0.3, 1.1, -0.4, 1.1, 0.0, -2.0, 0.9, 0.2], np.float32)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.9, "temperature": 1.7}],
    ids=str,
)
def test_draws_follow_the_filtered_probabilities(settings):
    """Chi-square over 4,096 candidates at 2 positions; alpha 1e-3 and a fixed seed, so it passes always or never."""
    drawn = draws(LOGITS, seed=3, **settings)
    probs = expected_probs(LOGITS[None], **settings)[0]
    counts = np.bincount(drawn.reshape(-1), minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    assert scipy.stats.chisquare(counts[kept], drawn.size * probs[kept]).pvalue > 1e-3


def test_draws_of_positions_candidates_and_seeds_are_independent():
    """One key for all positions would draw the same noise again and again: pairs of draws fill their table evenly."""
    flat = np.zeros(8, np.float32)
    drawn, other_seed = draws(flat, seed=5), draws(flat, seed=6)
    pairs = {
        "positions": (drawn[0], drawn[1]),
        "neighbouring candidates": (drawn[0, :-1], drawn[0, 1:]),
        "candidate and position": (drawn[1, :-1], drawn[0, 1:]),  # as it would be for fold_in(key, candidate + t)
        "seeds": (drawn[0], other_seed[0]),
    }
    for name, (a, b) in pairs.items():
        counts = np.bincount(8 * a + b, minlength=64)
        assert scipy.stats.chisquare(counts).pvalue > 1e-3, name


RECORDED_SEED_0 = [[3, 6, 5, 5, 0, 0, 1, 5, 0, 4, 6, 1], [6, 7, 5, 0, 3, 0, 4, 6, 1, 1, 3, 2]]


RECORDED_SEED_MAX = [[7, 2, 2, 6, 2, 5, 7, 1, 2, 7, 6, 3], [1, 5, 0, 1, 0, 2, 4, 1, 3, 1, 3, 2]]


def test_the_noise_of_a_seed_is_a_contract():
    """The same seed draws the same image in later versions of this package and of JAX: these draws were recorded."""
    flat = np.zeros(8, np.float32)
    assert draws(flat, seed=0)[:, :12].tolist() == RECORDED_SEED_0
    assert draws(flat, positions=(254, 255), seed=2**32 - 1)[:, :12].tolist() == RECORDED_SEED_MAX


def test_a_draw_depends_on_its_own_candidate_number_alone():
    """Padding and the place in a chunk must not matter: candidates 7, 2, 2 draw in the first rows what they draw."""
    usual, moved = draws(LOGITS, seed=9), draws(LOGITS, candidates=(7, 2, 2, 999), seed=9)
    np.testing.assert_array_equal(moved[:, :4], usual[:, [7, 2, 2, 999]])
    np.testing.assert_array_equal(moved[:, 4:], usual[:, 4:])


def test_temperature_zero_is_greedy_with_the_lowest_id_on_a_tie():
    """0 must not divide: it is the most likely code for every candidate and seed (1 and 3 tie here)."""
    for settings in ({}, {"top_k": 4}, {"top_p": 0.5}, {"seed": 77}):
        assert (draws(LOGITS, **settings, temperature=0) == 1).all()
