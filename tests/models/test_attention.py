"""Backends of the attention of one decoding step: each is what the forward pass gives, and their caches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformer_helpers import decode, forward, random_inputs, small

from mindalle_jax.config.schema import Stage2Config
from mindalle_jax.models.attention import (
    DECODE_ATTENTION,
    KV,
    PRIVATE_PREFIX,
    cache_axes,
    cache_capacity,
    decode_attention_cudnn,
    default_backend,
    new_cache,
    pad_cache,
    private_backend,
)
from mindalle_jax.models.quantization import Quantized
from mindalle_jax.models.transformer import Transformer, unstack_blocks


@pytest.fixture(autouse=True, scope="module")
def no_need_of_cudnn():
    """Its backend with XLA in the place of cuDNN, which has the same arguments and is not on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DECODE_ATTENTION, "cudnn", partial(decode_attention_cudnn, implementation="xla"))
        yield


# ---------------------------------------- backends


@pytest.mark.parametrize(
    ("attention", "kind", "width"),
    [
        *((name, "text", width) for name in DECODE_ATTENTION for width in (1, 16)),
        ("xla", "class", 1),
        ("xla", "free", 1),
    ],
)
def test_decoding_agrees_with_the_forward_pass_at_all_256_positions(random_params, kind, attention, width):
    """A cache filled one place off, or a mask that lets in an empty place, is right at first and wrong later on."""
    config = small(kind, ctx_len_img=256)
    params = random_params(config, "stage2")
    prefix_ids, codes = random_inputs(config, 3)
    prefix_ids = np.repeat(prefix_ids[:1], 3, axis=0)  # candidates of one prompt
    expected, _ = forward(Transformer(config.stage2), params, prefix_ids, codes)
    model = Transformer(config.stage2, stacked=False, attention=attention)
    actual = decode(model, unstack_blocks(params), prefix_ids[0], codes, width)
    worst = np.abs(actual - expected).max(axis=(0, 2))  # at each position
    assert worst.shape == (256,)
    assert worst.max() < 2e-5, f"from position {np.argmax(worst >= 2e-5)} on"


@pytest.mark.parametrize("attention", DECODE_ATTENTION)
def test_a_candidate_does_not_depend_on_its_neighbours(random_params, attention):
    """Bit for bit, whatever the others of its chunk are fed."""
    config = small("text")
    params = unstack_blocks(random_params(config, "stage2"))
    prefix_ids, codes = random_inputs(config, 4)
    model = Transformer(config.stage2, stacked=False, attention=attention)
    others = np.concatenate([codes[:1], (codes[1:] + 1) % config.stage2.vocab_size_img])
    first, second = (decode(model, params, prefix_ids[0], fed) for fed in (codes, others))
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1:, 1:] != second[1:, 1:]).any(axis=(1, 2)).all()


def test_a_candidate_is_not_seen_by_its_neighbours(random_params):
    """The cache keeps candidates apart: logits of one do not change with the codes of the others."""
    config = small("text")
    model, params = Transformer(config.stage2, stacked=False), unstack_blocks(random_params(config, "stage2"))
    prefix_ids, codes = random_inputs(config, 3)
    others = codes.copy()
    others[1:] = (others[1:] + 1) % config.stage2.vocab_size_img
    a, b = (decode(model, params, prefix_ids[0], rows) for rows in (codes, others))
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1:, 1:] - b[1:, 1:]).max() > 0.01


@pytest.mark.parametrize("attention", DECODE_ATTENTION)
def test_bfloat16_decoding_is_near_the_forward_pass(random_params, attention):
    """The cache is bfloat16 too; the same derivation and bound (0.03 was seen)."""
    config = small("text", embed_dim=64)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), unstack_blocks(random_params(config, "stage2")))
    prefix_ids, codes = random_inputs(config, 2)
    prefix_ids = np.repeat(prefix_ids[:1], 2, axis=0)
    model = Transformer(config.stage2, stacked=False, dtype=jnp.bfloat16, attention=attention)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(model.new_cache(1)))
    expected, _ = forward(model, params, prefix_ids, codes)
    assert np.abs(decode(model, params, prefix_ids[0], codes) - expected).max() < 0.1


B, H, P, M, T, K = 2, 3, 5, 4, 12, 8
"""Rows, heads, positions of the prefix, positions given, positions of the cache, width of a head."""


def random_kv(rng: np.random.Generator, *shape: int) -> KV:
    """Keys and values f32[shape]."""
    return KV(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in "kv"))


def expected_attention(q, keys, values) -> np.ndarray:
    """One query f[b, h, k] over keys and values [b, h, t, k], by the definition in float64."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    scores = np.einsum("bhk,bhtk->bht", q, keys) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bht,bhtk->bhk", weights / weights.sum(axis=-1, keepdims=True), values)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("attention", DECODE_ATTENTION)
def test_each_backend_is_the_definition(attention, window):
    """Below a prefix and four positions that are given; the second call reads what the first has put down."""
    rng = np.random.default_rng(0)
    prefix, given = random_kv(rng, H, P, K), random_kv(rng, H, M, K)
    cache = new_cache(attention, B, prefix, given, T, int8=False)
    seen = [
        jnp.broadcast_to(jnp.concatenate(pair, axis=1), (B, H, P + M, K)) for pair in zip(prefix, given, strict=True)
    ]
    attend = jax.jit(DECODE_ATTENTION[attention])
    for t in range(M, M + 2 * window, window):
        q, new = jnp.asarray(rng.standard_normal((B, window, H, K)), jnp.float32), random_kv(rng, B, window, H, K)
        attended, cache = attend(q, new, prefix, cache, jnp.int32(t))
        for at in range(window):
            latest = [x[:, at, :, None] for x in new]
            seen = [jnp.concatenate([old, x], axis=2) for old, x in zip(seen, latest, strict=True)]
            expected = expected_attention(q[:, at], *seen)
            np.testing.assert_allclose(attended[:, at], expected, rtol=0, atol=1e-5)  # of order one, in float32


def test_a_tpu_has_rows_in_its_lanes():
    assert [default_backend(platform) for platform in ("cpu", "gpu", "tpu")] == ["xla", "xla", "xla-lanes"]


@pytest.mark.parametrize("attention", DECODE_ATTENTION)
def test_every_backend_has_one_with_a_private_prefix(attention):
    """A batch of several prompts takes it, with the same order of axes; one that has it stays as it is."""
    private = private_backend(attention)
    assert private in PRIVATE_PREFIX and private_backend(private) == private
    assert cache_axes(private) == cache_axes(attention)
    assert (private == attention) == (attention in PRIVATE_PREFIX)


# ---------------------------------------- caches


def in_order(x, attention: str) -> np.ndarray:
    """Keys or values of a cache as [b, h, t, k], or their scales as [b, h, t]."""
    order, axes = ("bhtk", cache_axes(attention)) if x.ndim == 4 else ("bht", cache_axes(attention).replace("k", ""))
    return np.asarray(x).transpose([axes.index(axis) for axis in order])


@pytest.mark.parametrize("of_each_row", [False, True], ids=["one prefix", "a prefix for each row"])
@pytest.mark.parametrize("attention", DECODE_ATTENTION)
def test_a_new_cache_holds_what_is_given(attention, of_each_row):
    """A private prefix first, then the codes that are given, then zeros; a shared prefix is not in it."""
    rng = np.random.default_rng(0)
    rows = (B,) if of_each_row else ()
    prefix, given = random_kv(rng, *rows, H, P, K), random_kv(rng, *rows, H, M, K)
    cache = new_cache(attention, B, prefix, given, T, int8=False)
    private = P if attention in PRIVATE_PREFIX else 0
    assert cache_capacity(attention, cache) == private + T
    for found, before, own in zip(cache, prefix, given, strict=True):
        found = in_order(found, attention)
        np.testing.assert_array_equal(found[:, :, :private], np.broadcast_to(before, (B, H, P, K))[:, :, :private])
        np.testing.assert_array_equal(found[:, :, private : private + M], np.broadcast_to(own, (B, H, M, K)))
        assert (found[:, :, private + M :] == 0).all()


def test_no_more_is_given_than_the_cache_holds():
    """Codes to sample are zeros behind those that are given: the prefix is computed for all, the cache has a part."""
    given = random_kv(np.random.default_rng(0), H, T, K)
    cache = new_cache("xla", B, random_kv(np.random.default_rng(1), H, P, K), given, M, int8=False)
    assert cache_capacity("xla", cache) == M
    np.testing.assert_array_equal(cache.v[1], given.v[:, :M])


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("attention", [name for name in DECODE_ATTENTION if name != "cudnn"])
def test_a_longer_cache_begins_with_the_shorter_one(attention, int8):
    """Zeros at the end, of scales too; below the axis of guidance as without it."""
    rng = np.random.default_rng(0)
    cache = new_cache(attention, B, random_kv(rng, H, P, K), random_kv(rng, H, M, K), M, int8=int8)
    assert isinstance(cache.k, Quantized) == int8
    before = cache_capacity(attention, cache)
    longer = pad_cache(attention, cache, before + 3)
    assert cache_capacity(attention, longer) == before + 3
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(longer), strict=True):
        assert new.dtype == old.dtype and in_order(new, attention).shape[2] == before + 3
        np.testing.assert_array_equal(in_order(new, attention)[:, :, :before], in_order(old, attention))
        assert (in_order(new, attention)[:, :, before:] == 0).all()
    guided = pad_cache(attention, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache), before + 3)
    for both, one in zip(jax.tree.leaves(guided), jax.tree.leaves(longer), strict=True):
        np.testing.assert_array_equal(both, np.stack([one, one]))


def test_the_full_size_cache_has_its_documented_size():
    """6.34 GB in bfloat16 at 96 candidates: no layer, head or position is held twice, and nothing in float32."""
    model = Transformer(Stage2Config(), stacked=False, dtype=jnp.bfloat16)
    cache = jax.eval_shape(lambda: model.new_cache(96))
    assert sum(leaf.size * 2 for leaf in jax.tree.leaves(cache)) == 96 * 42 * 256 * 1536 * 2 * 2 == 6_341_787_648
