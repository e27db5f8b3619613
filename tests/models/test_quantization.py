"""int8 with one scale a row: what it loses, and that weights and cache in int8 give what their values say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindalle_jax import Dalle
from mindalle_jax.errors import NonFiniteError, UsageError
from mindalle_jax.models.attention import DECODE_ATTENTION
from mindalle_jax.models.quantization import Quantized, quantize
from mindalle_jax.models.transformer import Transformer, unstack_blocks
from mindalle_jax.storage.weights import leaf_shapes

MODES = ["weights", "weights+cache"]


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_off_by_half_a_scale_at_most(scale_dtype):
    """Also where the scale itself was rounded; in NumPy and on the device the same bits."""
    x = (np.random.default_rng(0).standard_normal((5, 3, 64)) * 10.0 ** np.arange(-3, 2)[:, None, None]).astype("f4")
    rows = quantize(jnp.asarray(x), scale_dtype)
    assert rows.values.dtype == jnp.int8 and rows.values.shape == x.shape
    assert rows.scale.dtype == scale_dtype and rows.scale.shape == (5, 3)
    scale = np.asarray(rows.scale, np.float32)[..., None]
    # bfloat16 has 8 bits: the largest number may be cut to 127 from 127.5.
    assert (np.abs(np.asarray(rows.values) * scale - x) <= scale * 0.5001).all()
    np.testing.assert_array_equal(np.abs(np.asarray(rows.values)).max(-1) >= 126, True)
    for ours, device in zip(quantize(x, jnp.dtype(scale_dtype)), rows, strict=True):
        assert isinstance(ours, np.ndarray)
        np.testing.assert_array_equal(ours, device)


def test_zeros_stay_and_what_is_broken_shows():
    """A row of zeros must not become NaN, and a row with NaN or infinity must not become numbers."""
    x = np.ones((4, 8), np.float32)
    x[0], x[1, 3], x[2, 5] = 0, np.nan, np.inf
    with np.errstate(invalid="ignore"):
        rows = quantize(x, np.float32)
    np.testing.assert_array_equal(rows.values[0], 0)
    assert not np.isfinite(rows.scale[1:3]).any() and np.isfinite(rows.scale[[0, 3]]).all()


def small(tiny_config, random_params):
    """A float32 model, its parameters, and the same with weights in int8, and with these in float32 again."""
    params = unstack_blocks(random_params(tiny_config, "stage2"))
    flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    int8, rounded = {}, {}
    for name, leaf in flat.items():
        int8[name] = rounded[name] = leaf
        if name.endswith("/weight"):
            rows = quantize(np.asarray(leaf), np.float32)
            int8 |= {name: rows.values, f"{name}_scale": rows.scale}
            rounded[name] = rows.values * rows.scale[..., None]
    return params, nested(int8), nested(rounded)


def nested(leaves):
    """{"a/b": x} -> {"a": {"b": x}}"""
    tree: dict = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = leaf
    return tree


def test_int8_weights_are_the_weights_they_stand_for(tiny_config, random_params):
    """The scale goes behind the product, and nothing else changes."""
    _, int8, rounded = small(tiny_config, random_params)
    assert int8["blocks_0"]["qkv"]["weight"].dtype == np.int8 and int8["head_img"]["weight_scale"].ndim == 1
    model = Transformer(tiny_config.stage2, stacked=False)
    h = tiny_config.stage2.hparams
    text, codes = np.full((2, h.ctx_len_txt), 3, np.int32), np.arange(2 * 64, dtype=np.int32).reshape(2, 64) % 80
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda params: model.apply({"params": params}, text, codes))
        for ours, expected in zip(*map(forward, (int8, rounded)), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("width", [1, 8])
def test_an_int8_cache_is_what_its_values_say(tiny_config, random_params, width):
    """The backends agree on it, to rounding, at every position; and it is not the exact cache."""
    params, _, _ = small(tiny_config, random_params)
    codes = np.random.default_rng(1).integers(0, 80, (2, 64)).astype(np.int32)
    text = np.full(tiny_config.stage2.hparams.ctx_len_txt, 3, np.int32)
    logits = {}
    for attention, int8 in (
        *((attention, True) for attention in DECODE_ATTENTION if attention != "cudnn"),
        ("xla", False),
    ):
        model = Transformer(tiny_config.stage2, stacked=False, attention=attention, int8_cache=int8)
        assert isinstance(model.new_cache(1)[0].k, Quantized) == int8
        with jax.default_matmul_precision("highest"):
            logits[attention, int8] = decode(model, params, text, codes, width)
    for attention in ("xla", "xla-lanes", "pallas"):
        np.testing.assert_allclose(logits[attention, True], logits["reference", True], rtol=0, atol=2e-5)
    # Which has the prefix in int8 as well.
    np.testing.assert_allclose(logits["xla-private", True], logits["reference", True], rtol=0, atol=0.05)
    error = np.abs(logits["xla", True] - logits["xla", False])
    assert 1e-5 < error.max() < 0.05, error.max()


def decode(model, params, text, codes, width):
    """f32[b, t, v] after each code, fed `width` at a time against the cache."""
    _, prefix, _ = model.apply({"params": params}, text, codes[0, :0], 0, method="prefill")
    step = jax.jit(
        lambda row, t, cache: model.apply({"params": params}, row, t, prefix, cache, method="step"),
        compiler_options={"xla_backend_optimization_level": "0"},
    )
    cache, parts = model.new_cache(len(codes), prefix=prefix), []
    for t in range(0, codes.shape[1], width):
        logits, cache = step(codes[:, t : t + width], t, cache)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_model_draws(tiny_model_folder, tiny_dalle, mode):
    """Near the exact one, in a quarter of the memory, and as independent of chunks; what it is stands in meta."""
    model = Dalle.from_pretrained(tiny_model_folder, quantize=mode)
    drawn = model.generate("the cat", num_candidates=6, batch_size=4, seed=1, ranker="likelihood")
    few = model.generate("the cat", num_candidates=3, batch_size=4, seed=1, ranker="likelihood")
    np.testing.assert_array_equal(few.codes, drawn.codes[:3])
    assert drawn.meta["quantize"] == mode and tiny_dalle.generate("the cat", num_candidates=1).meta["quantize"] is None

    text = model.tokenize(["the cat"] * 6)
    exact, ours = (m.logits(text, drawn.codes)[0] for m in (tiny_dalle, model))
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(ours)
    divergence = np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    assert 0 < divergence.mean() < 1e-4, divergence.mean()
    # Likelihoods are summed by way of the cache.
    chosen = np.take_along_axis(np.asarray(q), drawn.codes[..., None], axis=-1).sum((1, 2))
    np.testing.assert_allclose(drawn.scores, chosen, rtol=0, atol=1e-3 if mode == "weights" else 0.1)


def test_quantised_weights_take_a_quarter(tiny_config, tiny_model_folder):
    """Of float32; scales and what is not a matrix aside."""
    leaves = jax.tree.leaves_with_path(Dalle.from_pretrained(tiny_model_folder, quantize="weights")._stage2)
    sizes = {"/".join(key.key for key in path): leaf.nbytes for path, leaf in leaves}
    for name, shape in leaf_shapes(tiny_config, "stage2").items():
        if name.endswith("/weight") and "blocks" not in name:
            assert sizes[name] == np.prod(shape) and sizes[f"{name}_scale"] == 4 * shape[0]
    assert sizes["blocks_1/fc1/weight"] == 4 * 32 * 32 and sizes["blocks_1/qkv/weight_scale"] == 4 * 3 * 32


@pytest.mark.parametrize("options", [{"jacobi": True}, {"guidance_scale": 2.0}])
def test_an_int8_cache_with_all_that_sampling_knows(tiny_model_folder, options):
    """Jacobi decoding gives the same codes; guidance has its own axis; kept rows go into the cache."""
    model = Dalle.from_pretrained(tiny_model_folder, quantize="weights+cache")
    shared = {"num_candidates": 2, "batch_size": 2, "guidance_scale": options.get("guidance_scale", 1.0)}
    plain = model.generate_codes("the cat", **shared)
    np.testing.assert_array_equal(model.generate_codes("the cat", **shared | options), plain)
    kept = model.generate_codes("the cat", kept_codes=plain[0, :16], **shared)
    np.testing.assert_array_equal(kept[0], plain[0])


def test_broken_weights_are_told(tiny_config, tiny_model_folder):
    """int8 has no NaN, so it must be in the scale."""
    model = Dalle.from_pretrained(tiny_model_folder, quantize="weights")
    scale = np.array(model._stage2["blocks_0"]["fc1"]["weight_scale"])
    scale[0] = np.nan
    model._stage2["blocks_0"]["fc1"]["weight_scale"] = jnp.asarray(scale)
    with pytest.raises(NonFiniteError):
        model.generate_codes("the cat", num_candidates=1)


@pytest.mark.parametrize("mode", ["int8", True, ""])
def test_what_is_no_mode_is_refused(tiny_model_folder, mode):
    with pytest.raises(UsageError, match="quantize must be 'weights', 'weights\\+cache' or None"):
        Dalle.from_pretrained(tiny_model_folder, quantize=mode)
