"""Filters, noise and the decoding loop: what is kept, how often it is drawn, and what a draw depends on."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mindalle_jax import Dalle
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import NonFiniteError, UsageError
from mindalle_jax.sampling import filters
from mindalle_jax.sampling.filters import Rows, draw, filter_logits, gumbel_noise, kth_largest
from mindalle_jax.sampling.generate import request_rows, sample_codes
from mindalle_jax.sampling.options import DEFAULT_TOP_K, SamplingOptions, default_batch_size


def config_of(vocab_size: int) -> Config:
    """A configuration with so many codes."""
    return dataclasses.replace(Config(), stage2=dataclasses.replace(Config().stage2, vocab_size_img=vocab_size))


def settings_of(vocab_size=80, **settings) -> SamplingOptions:
    """Checked options, top-k off where it is not given."""
    return SamplingOptions.of(**{"top_k": None} | settings).check(config_of(vocab_size))


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
    """The same seed draws the same picture in later versions of this package and of JAX: these draws were recorded."""
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


# ---------------------------------------- what a picture depends on

BATCH = 4  # one compiled size for all tests of a device count


@pytest.fixture(scope="module")
def codes(tiny_dalle):
    """codes(prompt, n, ...) on one device."""
    return lambda prompt, n, **settings: tiny_dalle.generate_codes(
        prompt, num_candidates=n, batch_size=BATCH, **settings
    )


@pytest.fixture(scope="module")
def eleven(codes):
    """Candidates 0..10 of one prompt: three chunks, the last one padded."""
    return codes("the cat", 11, seed=1)


@pytest.mark.parametrize("n", [1, 3, 4, 5])
def test_a_candidate_is_the_same_however_many_are_drawn(codes, eleven, n):
    """Asking for more keeps the pictures that were there; a batch of another shape would change their last bits."""
    np.testing.assert_array_equal(codes("the cat", n, seed=1), eleven[:n])


def test_a_candidate_is_the_same_beside_any_prompts(codes, eleven):
    """Lists share nothing but the seed: neither order nor company changes a picture, and a list of one is no list."""
    a, b = codes(["the cat", "12 dogs"], 3, seed=1), codes(["12 dogs", "é", "the cat"], 3, seed=1)
    assert a.shape == (2, 3, 64) and b.shape == (3, 3, 64)
    np.testing.assert_array_equal(a[0], eleven[:3])
    np.testing.assert_array_equal(b[2], eleven[:3])
    np.testing.assert_array_equal(a[1], b[0])
    np.testing.assert_array_equal(codes(["the cat"], 3, seed=1)[0], eleven[:3])
    assert (a[0] != a[1]).any(axis=-1).all()


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_candidate_is_the_same_on_eight_devices(tiny_model_folder, codes, eleven, axis_type):
    """At one batch size per device; 33 candidates are two chunks there and nine on one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    dalle = Dalle.from_pretrained(tiny_model_folder, mesh=mesh)
    spread = dalle.generate_codes("the cat", num_candidates=33, batch_size=BATCH, seed=1)
    np.testing.assert_array_equal(spread[:11], eleven)
    np.testing.assert_array_equal(spread, codes("the cat", 33, seed=1))


def test_a_candidate_is_the_same_in_bfloat16(tiny_model_folder):
    """Where rounding is coarse, logits that depend on the company of a candidate change its picture for certain."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    one = Dalle.from_pretrained(tiny_model_folder, dtype="bfloat16")
    eight = Dalle.from_pretrained(tiny_model_folder, dtype="bfloat16", mesh=mesh)
    whole = one.generate_codes("the cat", num_candidates=11, batch_size=BATCH)
    np.testing.assert_array_equal(one.generate_codes("the cat", num_candidates=2, batch_size=BATCH), whole[:2])
    np.testing.assert_array_equal(eight.generate_codes("the cat", num_candidates=11, batch_size=BATCH), whole)


def test_candidates_and_seeds_differ(codes, eleven):
    """A forgotten fold_in gives the same picture n times."""
    assert len({row.tobytes() for row in eleven}) == 11
    other = codes("the cat", 3, seed=2)
    for row in other:
        assert (row != eleven).mean(axis=-1).min() > 0.5


def test_settings_have_an_effect(codes, eleven):
    """top_k, top_p, temperature and the prompt reach the loop."""
    greedy = codes("the cat", 4, seed=1, temperature=0)
    assert (greedy == greedy[0]).all()
    np.testing.assert_array_equal(codes("the cat", 4, seed=1, top_k=1), greedy)
    np.testing.assert_array_equal(codes("the cat", 4, seed=1, top_p=1e-9), greedy)
    for settings in ({"temperature": 3.0}, {"top_k": 5}, {"top_p": 0.5}):
        assert (codes("the cat", 4, seed=1, **settings) != eleven[:4]).any(), settings


def test_the_default_top_k_is_the_whole_of_a_small_vocabulary(codes, eleven):
    """256 would be refused for the 80 codes here if it were asked for; as the default it means all of them."""
    np.testing.assert_array_equal(codes("the cat", 3, seed=1, top_k=80), eleven[:3])
    np.testing.assert_array_equal(codes("the cat", 3, seed=1, top_k=None), eleven[:3])


def test_no_setting_compiles_again(codes, compilations):
    """A slider that compiles takes 10 s instead of 1 on a GPU: only the batch size, or another model, may."""
    codes("the cat", 3)
    before = len(compilations)
    codes("the cat", 3, temperature=0.5)
    codes("the cat", 3, temperature=0)
    codes("the cat", 3, temperature=1)
    codes("the cat", 3, top_p=0.9)
    codes("the cat", 3, top_p=1)
    codes("the cat", 3, top_p=None)
    codes("the cat", 3, top_k=7)
    codes("the cat", 3, top_k=None)
    codes("the cat", 3, top_k=1, top_p=0.3, temperature=2.5)
    codes("the cat", 3, seed=2**32 - 1)
    codes("the cat", 3, seed=None)
    codes("the dog and the cat", 3)
    codes("12", 9)
    codes(["the dog", "12"], 1)
    assert len(compilations) == before


def test_another_batch_size_compiles(tiny_dalle, compilations):
    """The count above counts."""
    tiny_dalle.generate_codes("the cat", num_candidates=1, batch_size=7)  # as nowhere else
    assert len(compilations) > 0


def test_codes_come_row_by_row(tiny_dalle):
    """Progress, previews and stopping live on it; padding is not given out."""
    request = request_rows(six(tiny_dalle), tiny_dalle.tokenize("the cat"), 80, BATCH)
    drawn = sample_codes(tiny_dalle._networks, request)
    assert [(part.rows[0], part.start, part.values.shape) for part in drawn] == [
        (first, start, (count, 8)) for first, count in ((0, 4), (4, 2)) for start in range(0, 64, 8)
    ]


def six(dalle: Dalle) -> SamplingOptions:
    """Six candidates of one prompt."""
    return SamplingOptions.of(prompts=("the cat",), num_candidates=6).check(dalle.config, dalle.tokenizer)


def test_prefix_ids_out_of_range_are_refused(tiny_dalle):
    """An embedding clamps an id that it does not have, silently."""
    for bad in (-1, 110):
        request = request_rows(six(tiny_dalle), np.full((1, 12), bad, np.int32), 80, BATCH)
        with pytest.raises(UsageError, match=r"\[0, 110\)"):
            next(sample_codes(tiny_dalle._networks, request))


# ---------------------------------------- damaged weights


def damaged(dalle: Dalle, module: str, row: int, value: float) -> Dalle:
    """The model with one row of an embedding overwritten."""
    other = copy.copy(dalle)
    table = dalle._stage2[module]["embedding"]
    changed = np.array(table)
    changed[row] = value
    other._stage2 = dalle._stage2 | {module: {"embedding": jax.device_put(changed, table.sharding)}}
    return other


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("position", [0, 5, 40])
def test_broken_weights_name_the_step(tiny_dalle, position, value):
    """NaN logits draw code 0 for ever, a plausible flat picture. Position t is read when code t + 1 is drawn."""
    broken = damaged(tiny_dalle, "pos_emb_img", position, value)
    with pytest.raises(NonFiniteError, match=f"step {position + 1} of candidate 0: .*damaged"):
        broken.generate_codes("the cat", num_candidates=2, batch_size=BATCH)


@pytest.mark.parametrize("position", [0, 5, 40])
def test_broken_weights_name_the_row_in_jacobi_decoding(tiny_dalle, position):
    """A value that no earlier position attends to reaches it all the same, as 0 times NaN."""
    broken = damaged(tiny_dalle, "pos_emb_img", position, np.nan)
    with pytest.raises(NonFiniteError, match=f"step {position // 8 * 8 + 1} of candidate 0: .*damaged"):
        broken.generate_codes("the cat", num_candidates=2, batch_size=BATCH, jacobi=True)


def test_broken_weights_name_the_candidate(tiny_dalle, codes):
    """Not the first, and not one of the first chunk: the embedding of a code that it alone draws is damaged."""

    def cases():
        for seed in range(20):
            drawn = codes("the cat", 8, seed=seed)
            for candidate in (5, 6, 7):
                for t, code in enumerate(drawn[candidate, :40]):
                    # The first chunk never draws it, the rest of the second not before it is noticed.
                    others = [i for i in range(4, 8) if i != candidate]
                    if (drawn[:4] != code).all() and (drawn[others, : t + 10] != code).all():
                        if (drawn[candidate, :t] != code).all():
                            yield seed, candidate, t, code

    seed, candidate, t, code = next(cases())
    broken = damaged(tiny_dalle, "tok_emb_img", code, np.nan)
    with pytest.raises(NonFiniteError, match=f"step {t + 1} of candidate {candidate}:"):
        broken.generate_codes("the cat", num_candidates=8, batch_size=BATCH, seed=seed)


def test_a_broken_text_table_is_seen_at_step_0(tiny_dalle):
    """The prefix gives the logits of code 0."""
    broken = damaged(tiny_dalle, "tok_emb_txt", tiny_dalle.tokenizer.pad_id, np.nan)
    with pytest.raises(NonFiniteError, match="step 0 of candidate 0"):
        broken.generate_codes("the cat", num_candidates=1, batch_size=BATCH)


def test_the_last_code_is_not_an_error(tiny_dalle):
    """Position 63 is fed and its logits are not used: a picture that is complete is not refused."""
    broken = damaged(tiny_dalle, "pos_emb_img", 63, np.nan)
    expected = tiny_dalle.generate_codes("the cat", num_candidates=2, batch_size=BATCH)
    np.testing.assert_array_equal(broken.generate_codes("the cat", num_candidates=2, batch_size=BATCH), expected)


# ---------------------------------------- checks of settings


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("top_k", [0, -1, 81, 256, 2.5, True, "5", float("nan")], r"integer in \[1, 80\] .*off"),
        ("top_p", [0, 0.0, -0.1, 1.0000001, float("nan"), float("inf"), True, "0.5"], r"number in \(0, 1\], or .*off"),
        ("temperature", [-1, -1e-9, float("nan"), float("inf"), True, "1", None], "finite number > 0, or 0 for greedy"),
        ("seed", [-1, 2**32, 2**32 + 5, 1.0, True, "7"], r"integer in \[0, 4294967296\)"),
    ],
)
def test_settings_out_of_range_name_the_value_and_the_limits(name, values, message):
    """By themselves: index errors deep in JAX, an inverted distribution, or seed 5 for 2**32 + 5."""
    for value in values:
        with pytest.raises(UsageError, match=f"{name} must be .*{message}") as raised:
            settings_of(**{name: value})
        assert str(raised.value).endswith(repr(value))
        assert "\n" not in str(raised.value)


def test_settings_at_the_limits_are_taken():
    """Ends of the ranges, and NumPy's numbers, which come out of arrays and sliders."""

    def values(**settings) -> tuple:
        found = settings_of(**settings)
        return tuple(getattr(found, name) for name in ("seed", "temperature", "top_k", "top_p", "guidance_scale"))

    assert values(top_k=1, top_p=1, temperature=0, seed=0) == (0, 0.0, 1, 1.0, 1.0)
    numpy_values = {"top_k": np.int64(80), "top_p": np.float32(0.5), "temperature": np.float64(2), "seed": np.uint32(7)}
    assert values(**numpy_values) == (7, 2.0, 80, 0.5, 1.0)
    assert settings_of(seed=2**32 - 1).seed == 2**32 - 1
    assert settings_of(top_k=DEFAULT_TOP_K).top_k == 80
    assert settings_of(16384, top_k=DEFAULT_TOP_K).top_k == 256


def test_seed_none_draws_a_seed():
    """And tells it, so that a good picture can be had again."""
    seeds = {settings_of(seed=None).seed for _ in range(8)}
    assert len(seeds) > 1 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("value", [0, -1, 1001, 10**6, 1.0, True, "4", None])
def test_num_candidates_out_of_range(value):
    """0 gives empty arrays and a million runs for days."""
    with pytest.raises(UsageError, match=r"num_candidates must be an integer in \[1, 1000\], not"):
        settings_of(num_candidates=value)


def test_num_candidates_at_the_limits():
    assert [settings_of(num_candidates=n).num_candidates for n in (1, 1000, np.int32(96))] == [1, 1000, 96]


def test_default_batch_size():
    """A function of count, backend and size alone: powers of two, then what wastes least of the usual 96."""
    assert [default_batch_size(n, "cpu", small=False) for n in (1, 2, 3, 5, 8, 9, 1000)] == [1, 2, 4, 8, 8, 16, 16]
    assert [default_batch_size(n, "cpu", small=True) for n in (1, 2, 3, 5, 8, 9, 1000)] == [1, 1, 2, 4, 4, 8, 8]
    expected = {1: 1, 3: 4, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 96, 96: 96, 97: 128, 128: 128, 1000: 128}
    for backend in ("gpu", "tpu"):
        for small in (False, True):
            assert {n: default_batch_size(n, backend, small=small) for n in expected} == expected
