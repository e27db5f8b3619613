"""The decoding loop: what an image depends on, damaged weights, caches that grow, and Jacobi decoding."""

from functools import partial

import jax
import numpy as np
import pytest
from sampling_helpers import BATCH, LENGTH, WIDTH

from mindalle_jax import Dalle
from mindalle_jax.errors import NonFiniteError, UsageError
from mindalle_jax.models.attention import DECODE_ATTENTION, PRIVATE_PREFIX, decode_attention_cudnn
from mindalle_jax.sampling import decode as decode_module
from mindalle_jax.sampling.decode import cache_lengths, prefill, sample_row, start_decode
from mindalle_jax.sampling.generate import request_rows
from mindalle_jax.sampling.options import SamplingOptions


def shallow_copy(dalle: Dalle) -> Dalle:
    """Another model of the same arrays, which may be changed."""
    other = object.__new__(Dalle)
    vars(other).update(vars(dalle))
    return other


# ---------------------------------------- what an image depends on


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


# ---------------------------------------- a growing cache


@pytest.mark.parametrize(
    ("quantize", "attention", "options"),
    [
        (None, "xla", {}),
        ("weights+cache", "xla-lanes", {"guidance_scale": 2.0}),
        (None, "xla", {"jacobi": True}),
        (None, "xla-lanes", {"keep_rows": 3}),
    ],
    ids=str,
)
def test_a_cache_that_grows_draws_the_same_codes(tiny_model_folder, monkeypatch, quantize, attention, options):
    """From two rows to all eight, in four sizes, on two devices. Likelihoods but for the order of sums."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    model = Dalle.from_pretrained(tiny_model_folder, quantize=quantize, mesh=mesh)
    model._transformer = model._transformer.copy(attention=attention)
    shared = {"num_candidates": 3, "batch_size": 1, "seed": 1, "ranker": "likelihood"} | options
    if "keep_rows" in options:
        shared["kept_codes"] = np.arange(shared.pop("keep_rows") * WIDTH)
    whole = model.generate("the cat", **shared)
    monkeypatch.setitem(decode_module.NUM_CACHE_SIZES, "cpu", 4)
    assert cache_lengths(model._transformer, "cpu") == [16, 32, 48, 64]
    grown = model.generate("the cat", **shared)
    np.testing.assert_array_equal(grown.codes, whole.codes)
    np.testing.assert_allclose(grown.scores, whole.scores, rtol=0, atol=1e-3)


@pytest.mark.parametrize("attention", [*PRIVATE_PREFIX, "xla-lanes", "pallas", "reference"])
@pytest.mark.parametrize("options", [{"guidance_scale": 2.0}, {"keep_rows": 3}], ids=str)
def test_every_backend_of_attention_draws_the_same_codes(tiny_dalle, monkeypatch, attention, options):
    """After one prefix and after two, and below rows that are given."""
    monkeypatch.setitem(DECODE_ATTENTION, "cudnn", partial(decode_attention_cudnn, implementation="xla"))
    shared = {"num_candidates": 3, "batch_size": BATCH, "seed": 1, "ranker": "likelihood"} | options
    if "keep_rows" in options:
        shared["kept_codes"] = np.arange(shared.pop("keep_rows") * WIDTH)
    expected = tiny_dalle.generate("the cat", **shared)
    other = shallow_copy(tiny_dalle)
    other._transformer = tiny_dalle._transformer.copy(attention=attention)
    drawn = other.generate("the cat", **shared)
    np.testing.assert_array_equal(drawn.codes, expected.codes)
    np.testing.assert_allclose(drawn.scores, expected.scores, rtol=0, atol=1e-3)


def test_sizes_of_the_cache(tiny_dalle, monkeypatch):
    """Whole rows, however many sizes; one for the kernel that reads what is filled."""
    model = tiny_dalle._transformer
    for sizes, expected in ((1, [64]), (3, [24, 48, 64]), (8, list(range(8, 65, 8))), (20, list(range(8, 65, 8)))):
        monkeypatch.setitem(decode_module.NUM_CACHE_SIZES, "cpu", sizes)
        assert cache_lengths(model, "cpu") == expected
    assert cache_lengths(model, "gpu") == [16, 32, 48, 64]
    for attention in ("pallas", *PRIVATE_PREFIX):
        assert cache_lengths(model.copy(attention=attention), "gpu") == [64]


# ---------------------------------------- Jacobi decoding


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.8, "seed": 9}, {"guidance_scale": 2.0}],
    ids=["plain", "greedy", "filtered", "guided"],
)
def test_jacobi_decoding_draws_the_same_codes(tiny_dalle, options):
    """Six candidates in chunks of four. Logits of a window differ in their last bits, which decides no draw here."""
    options = {"num_candidates": 6, "batch_size": BATCH, "ranker": "likelihood"} | options
    one, rows = (tiny_dalle.generate("the cat", jacobi=jacobi, **options) for jacobi in (False, True))
    np.testing.assert_array_equal(one.codes, rows.codes)
    np.testing.assert_allclose(one.scores, rows.scores, rtol=0, atol=1e-3)
    assert (one.meta["jacobi"], rows.meta["jacobi"]) == (False, True)


def test_jacobi_decoding_completes_images_and_knows_classes(tiny_dalle, igpt, plain):
    options = {"num_candidates": 3, "batch_size": BATCH}
    for draw in (
        lambda jacobi: tiny_dalle.variations("the cat", plain.codes[0], keep_rows=3, jacobi=jacobi, **options),
        lambda jacobi: igpt.generate(2, jacobi=jacobi, **options),
    ):
        np.testing.assert_array_equal(draw(True).codes, draw(False).codes)


def test_a_candidate_of_jacobi_decoding_does_not_depend_on_the_others(tiny_dalle):
    """Passes go on until the slowest of a chunk is done, and change nothing of those that are."""
    options = {"batch_size": BATCH, "jacobi": True, "seed": 5}
    whole = tiny_dalle.generate_codes("the cat", num_candidates=6, **options)
    np.testing.assert_array_equal(tiny_dalle.generate_codes("the cat", num_candidates=2, **options), whole[:2])


def test_jacobi_decoding_takes_fewer_passes_where_codes_can_be_guessed(tiny_dalle, plain):
    """At least one pass a row, at most one a code and one more; few, if the row above is the answer."""
    model, params, mesh = tiny_dalle._transformer, tiny_dalle._stage2, tiny_dalle.mesh
    options = SamplingOptions.of(prompts=("the cat",), num_candidates=BATCH, seed=1, top_k=None)
    prefix_ids = tiny_dalle.tokenize("the cat")
    rows = request_rows(options.check(tiny_dalle.config), prefix_ids, 80, BATCH).rows
    prefix, passes = prefill(model, params, prefix_ids[0], np.zeros(0, np.int32), np.int32(0)), []
    with jax.threefry_partitionable(True), jax.default_matmul_precision("highest"):
        for guess in (np.full((BATCH, WIDTH), -1, np.int32), plain.codes[:BATCH, :WIDTH]):
            state = start_decode(model, mesh, BATCH, LENGTH, False, prefix, np.int32(0))
            state, codes = sample_row(model, mesh, True, params, prefix.kv, rows, state, guess)
            np.testing.assert_array_equal(codes, plain.codes[:BATCH, :WIDTH])
            passes.append(set(np.asarray(state.passes).tolist()))
    assert passes[1] == {1} and len(passes[0]) == 1 and 2 <= min(passes[0]) <= WIDTH + 1


@pytest.mark.parametrize("jacobi", [0, "yes", None])
def test_jacobi_is_true_or_false(tiny_dalle, jacobi):
    with pytest.raises(UsageError, match="jacobi must be True or False, not"):
        tiny_dalle.generate("the cat", jacobi=jacobi)


# ---------------------------------------- damaged weights


def damaged(dalle: Dalle, module: str, row: int, value: float) -> Dalle:
    """The model with one row of an embedding overwritten."""
    other = shallow_copy(dalle)
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
