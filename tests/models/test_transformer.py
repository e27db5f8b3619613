"""The transformer against the same network in PyTorch, and its ways of computing one thing against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformer_helpers import KINDS, config_of, forward, random_inputs, small

from mindalle_jax.config.schema import Config
from mindalle_jax.models.transformer import Transformer, unstack_blocks
from mindalle_jax.storage.weights import count_parameters

TOLERANCE = 1e-4
"""Absolute, on logits of order 1 in float32: 40 times what the two programs were seen to differ by (2.3e-6)."""


def random_config(seed: int) -> Config:
    rng = np.random.default_rng(seed)
    heads, head_dim = int(rng.integers(1, 6)), int(rng.choice([4, 8, 20]))
    return config_of(
        KINDS[seed % 3],
        vocab_txt=int(rng.integers(2, 90)),
        vocab_img=int(rng.integers(2, 90)),
        n_classes=int(rng.integers(1, 12)),
        embed_dim=heads * head_dim,
        n_heads=heads,
        n_layers=int(rng.integers(1, 5)),
        ctx_len_img=int(rng.integers(1, 30)),
        ctx_len_txt=int(rng.integers(1, 12)),
        mlp_bias=bool(rng.integers(2)),
        attn_bias=bool(rng.integers(2)),
        gelu_use_approx=bool(rng.integers(2)),
    )


@pytest.mark.parametrize("seed", range(21))
def test_logits_agree_with_pytorch(oracle, to_params, seed):
    """Any shape of the network, not the released one alone: no biases, approximate GELU, one text position or class."""
    import torch

    config = random_config(seed)
    c, h = config.stage2, config.stage2.hparams
    fields = {k: v for k, v in dataclasses.asdict(h).items() if k in oracle.TransformerConfig.__dataclass_fields__}
    theirs_config = oracle.TransformerConfig(**fields, vocab_txt=c.vocab_size_txt, vocab_img=c.vocab_size_img)
    cls = oracle.ImageTransformer if config.image_only else oracle.Transformer
    theirs = oracle.randomize(cls(theirs_config), seed).eval()
    params = to_params(config, "stage2", {key: tensor.numpy() for key, tensor in theirs.state_dict().items()})

    rng = np.random.default_rng(seed)
    prefix_ids, codes = random_inputs(config, 3, int(rng.integers(1, h.ctx_len_img + 1)), seed)
    image_logits, text_logits = forward(Transformer(c), params, prefix_ids, codes)
    with torch.inference_mode():
        prefix, sequence = torch.from_numpy(prefix_ids).long(), torch.from_numpy(codes).long()
        if config.image_only:
            expected, expected_text = theirs(sequence, prefix[:, 0] if c.use_cls_cond else None), None
        else:
            expected, expected_text = theirs(prefix, sequence)
    assert image_logits.dtype == jnp.float32 and image_logits.shape == expected.shape
    np.testing.assert_allclose(image_logits, expected.numpy(), rtol=0, atol=TOLERANCE)
    if expected_text is None:
        assert text_logits is None
    else:
        assert text_logits.dtype == jnp.float32 and text_logits.shape == expected_text.shape
        np.testing.assert_allclose(text_logits, expected_text.numpy(), rtol=0, atol=TOLERANCE)


def test_a_code_is_seen_by_later_positions_only(random_params):
    """Logits of code t come from codes 0..t-1: with one shift wrong the model would see what it is to predict."""
    config = small("text")
    model, params = Transformer(config.stage2), random_params(config, "stage2")
    prefix_ids, codes = random_inputs(config, 2)
    before, text_before = forward(model, params, prefix_ids, codes)
    for t in (0, 7, 14):
        changed = codes.copy()
        changed[0, t] = (changed[0, t] + 1) % config.stage2.vocab_size_img
        after, text_after = forward(model, params, prefix_ids, changed)
        np.testing.assert_array_equal(after[0, : t + 1], before[0, : t + 1])
        assert np.abs(after[0, t + 1] - before[0, t + 1]).max() > 1e-3
        np.testing.assert_array_equal(text_after, text_before)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_and_unstacked_blocks_are_the_same_network(random_params, kind):
    """Two layouts, one network; what may remain is the order of additions in what XLA compiles."""
    config = small(kind, n_layers=3)
    params = random_params(config, "stage2")
    inputs = random_inputs(config, 2)
    stacked = forward(Transformer(config.stage2), params, *inputs)
    unstacked = forward(Transformer(config.stage2, stacked=False), unstack_blocks(params), *inputs)
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(unstacked), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_unstacking_gives_the_parameters_that_the_unstacked_network_declares(random_params):
    """Names, shapes and layer order: blocks_2 is the third layer."""
    config = small("text", n_layers=3)
    params = random_params(config, "stage2")
    layers = unstack_blocks(params)
    declared = jax.eval_shape(
        Transformer(config.stage2, stacked=False).init, jax.random.key(0), *random_inputs(config, 1)
    )["params"]
    assert jax.tree.map(np.shape, layers) == jax.tree.map(np.shape, declared)
    np.testing.assert_array_equal(layers["blocks_2"]["qkv"]["weight"], params["blocks"]["qkv"]["weight"][2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_picture_is_the_beginning_of_a_longer_one(random_params, kind):
    """T below ctx_len_img: fine-tuning and scoring feed parts of pictures, down to one code (no code is fed then)."""
    config = small(kind)
    params, (prefix_ids, codes) = random_params(config, "stage2"), random_inputs(config, 2)
    whole, _ = forward(Transformer(config.stage2), params, prefix_ids, codes)
    for length in (1, 5):
        part, _ = forward(Transformer(config.stage2), params, prefix_ids, codes[:, :length])
        np.testing.assert_allclose(part, whole[:, :length], rtol=0, atol=1e-5)


def test_the_start_vector_of_a_class_is_its_row(random_params):
    """The image-only model sees its class through `sos` alone, without a positional embedding."""
    config = small("class")
    model, params = Transformer(config.stage2), random_params(config, "stage2")
    labels = np.asarray([[0], [6]], np.int32)
    embedded = model.apply({"params": params}, labels, method="embed_prefix")
    np.testing.assert_array_equal(embedded[:, 0], params["sos"]["embedding"][[0, 6]])


@pytest.mark.parametrize("stacked", [True, False])
def test_bfloat16_logits_are_near_float32(random_params, stacked):
    """bfloat16 keeps 8 bits, so one rounding moves a value by up to 2**-9 of itself. About 12 roundings a layer in two
    layers, independent of each other, on values of order 1: sqrt(24) * 2**-9 = 0.01 in the mean. Taken times 2 for the
    mean, and times 5 of that for the worst of 2,000 logits. A softmax or LayerNorm in bfloat16 would stay inside; an
    accumulation in bfloat16, or a wrong cast, does not."""
    config = small("text", embed_dim=64)
    params, inputs = random_params(config, "stage2"), random_inputs(config, 2)
    exact, exact_text = forward(Transformer(config.stage2), params, *inputs)
    model = Transformer(config.stage2, stacked=stacked, dtype=jnp.bfloat16)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params if stacked else unstack_blocks(params))
    logits, text_logits = forward(model, half, *inputs)
    for a, b in [(logits, exact), (text_logits, exact_text)]:
        assert a.dtype == jnp.float32
        error = np.abs(np.asarray(a) - np.asarray(b))
        assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.02, "equal to float32 would mean that it is not bfloat16"
        assert error.max() < 0.1


@pytest.mark.parametrize("length", [15, 16])
def test_flash_attention_is_fed_an_even_number_of_positions(random_params, monkeypatch, length):
    """Which its backward pass needs; logits are those of the same positions. XLA is in the place of cuDNN."""
    config, lengths, attend = small("text"), [], jax.nn.dot_product_attention

    def watch(q, k, v, *, is_causal, implementation):
        lengths.append((implementation, q.shape[1]))
        return attend(q, k, v, is_causal=is_causal)

    params = random_params(config, "stage2")
    prefix_ids, codes = random_inputs(config, 2, length)
    expected = forward(Transformer(config.stage2), params, prefix_ids, codes)
    monkeypatch.setattr(jax.nn, "dot_product_attention", watch)
    found = forward(Transformer(config.stage2, flash_attention=True), params, prefix_ids, codes)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert set(lengths) == {("cudnn", 20)}  # of 5 + 15 - 1 = 19 and 5 + 16 - 1 = 20


def test_parameter_counts_are_the_published_ones():
    """Both were counted on the original; shapes only, nothing of the 5.5 GB is allocated."""
    assert count_parameters(Config(), "stage2") == 1_291_081_728
    assert count_parameters(Config(), "stage1") == 76_073_859
