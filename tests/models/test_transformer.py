"""The transformer against the same network in PyTorch, and its ways of computing one thing against each other."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindalle_jax.config.schema import Config, Stage2Config, Stage2Hparams
from mindalle_jax.models.attention import DECODE_ATTENTION, decode_attention_cudnn
from mindalle_jax.models.transformer import Transformer, unstack_blocks
from mindalle_jax.storage.weights import count_parameters


@pytest.fixture(autouse=True, scope="module")
def no_need_of_cudnn():
    """Its backend with XLA in the place of cuDNN, which has the same arguments and is not on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DECODE_ATTENTION, "cudnn", partial(decode_attention_cudnn, implementation="xla"))
        yield


KINDS = ("text", "class", "free")

TOLERANCE = 1e-4
"""Absolute, on logits of order 1 in float32: 40 times what the two programs were seen to differ by (2.3e-6)."""


def config_of(kind: str, *, vocab_txt=50, vocab_img=40, n_classes=7, **hparams) -> Config:
    stage2 = Stage2Config(
        type="transformer1d" if kind == "text" else "igpt",
        vocab_size_txt=vocab_txt,
        vocab_size_img=vocab_img,
        use_cls_cond=kind == "class",
        hparams=Stage2Hparams(n_classes=n_classes if kind == "class" else None, **hparams),
    )
    return Config(stage2=stage2)


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


def random_inputs(config: Config, batch: int, length: int | None = None, seed: int = 0):
    """Prefix ids [batch, p] and codes [batch, length]."""
    rng, c = np.random.default_rng(seed), config.stage2
    if c.type == "igpt":
        prefix_ids = rng.integers(0, (c.hparams.n_classes or 1) if c.use_cls_cond else 1, (batch, 1))
    else:
        prefix_ids = rng.integers(0, c.vocab_size_txt, (batch, c.hparams.ctx_len_txt))
    codes = rng.integers(0, c.vocab_size_img, (batch, length or c.hparams.ctx_len_img))
    return prefix_ids.astype(np.int32), codes.astype(np.int32)


# Of dozens of networks each is run once: LLVM need not optimise what takes 100 times as long to compile as to run.
@partial(jax.jit, static_argnames="model", compiler_options={"xla_backend_optimization_level": "0"})
def _forward(model, params, prefix_ids, codes):
    return model.apply({"params": params}, prefix_ids, codes)


def forward(model: Transformer, params, prefix_ids, codes):
    """Image and text logits of the forward pass, in full float32."""
    with jax.default_matmul_precision("highest"):
        return _forward(model, params, prefix_ids, codes)


@partial(jax.jit, static_argnames=("model", "width"))
def _decode(model, params, prefix_ids, codes, width):
    variables, (b, t) = {"params": params}, codes.shape
    logits, prefix, _ = model.apply(variables, prefix_ids, codes[0, :0], 0, method="prefill")

    def step(cache, at):
        logits, cache = model.apply(variables, at[0], at[1], prefix, cache, method="step")
        return cache, logits

    windows = codes.reshape(b, t // width, width).swapaxes(0, 1)
    _, rest = jax.lax.scan(step, model.new_cache(b, prefix=prefix), (windows, jnp.arange(0, t, width)))
    rest = rest.swapaxes(0, 1).reshape(b, t, -1)[:, :-1]
    return jnp.concatenate([jnp.broadcast_to(logits, (b, 1, len(logits))), rest], axis=1)


def decode(model: Transformer, params, prefix_ids, codes, width=1):
    """Image logits [b, t, v] by prefill and steps, fed the codes [b, t] `width` at a time; one prefix [p] for all."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(_decode(model, params, prefix_ids, codes, width))


def small(kind: str, **changes) -> Config:
    sizes = {"embed_dim": 32, "n_layers": 2, "n_heads": 4, "ctx_len_img": 16, "ctx_len_txt": 5}
    return config_of(kind, **(sizes | changes))


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


@pytest.mark.parametrize("int8_cache", [False, True])
def test_the_pallas_kernel_below_the_two_prefixes_of_guidance(random_params, int8_cache):
    """vmap gives the kernel another axis, the cache that it fills in place too."""
    config = small("text")
    params = unstack_blocks(random_params(config, "stage2"))
    prefix_ids, codes = random_inputs(config, 2)
    found = {}
    for attention in ("xla", "pallas"):
        model = Transformer(config.stage2, stacked=False, attention=attention, int8_cache=int8_cache)
        both = jax.vmap(lambda ids, model=model: _decode(model, params, ids, codes, 1))
        with jax.default_matmul_precision("highest"):
            found[attention] = both(prefix_ids)
    assert np.abs(found["xla"][0] - found["xla"][1]).max() > 1e-3
    np.testing.assert_allclose(found["pallas"], found["xla"], rtol=0, atol=2e-5)


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


def test_the_full_size_cache_has_its_documented_size():
    """6.34 GB in bfloat16 at 96 candidates: no layer, head or position is held twice, and nothing in float32."""
    model = Transformer(Stage2Config(), stacked=False, dtype=jnp.bfloat16)
    cache = jax.eval_shape(lambda: model.new_cache(96))
    assert sum(leaf.size * 2 for leaf in jax.tree.leaves(cache)) == 96 * 42 * 256 * 1536 * 2 * 2 == 6_341_787_648
