"""Muon: what it does with the matrices of a network, and that the rest has AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mindalle_jax.config.schema import OptimizerConfig
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.step import steps_made

CONFIG = OptimizerConfig(opt_type="muon", base_lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), grad_clip_norm=1e9)
SHAPES = {
    "blocks/qkv/weight": (2, 3, 8, 16),
    "encoder/down_0_block_0/conv1/kernel": (3, 3, 4, 8),
    "text_model/encoder/layers/0/mlp/fc1/kernel": (8, 32),
    "encoder/conv_in/kernel": (3, 3, 3, 8),
    "decoder/conv_out/kernel": (3, 3, 8, 3),
    "head_img/weight": (16, 8),
    "head/weight": (16, 8),
    "tok_emb_img/embedding": (16, 8),
    "codebook": (16, 4),
    "blocks/fc1/bias": (2, 8),
}
REST = list(SHAPES)[3:]


def as_matrices(path: str, leaf) -> np.ndarray:
    """[m, in, out]"""
    leaf = np.asarray(leaf, np.float64)
    if path.endswith("/kernel"):
        return leaf.reshape(1, -1, leaf.shape[-1])
    return leaf.reshape(-1, *leaf.shape[-2:]).transpose(0, 2, 1)


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    return tuple(
        {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()} for _ in range(2)
    )


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_matrices_move_along_their_singular_vectors_and_the_rest_by_adamw(start, decay):
    """Newton and Schulz's iteration brings singular values near 1 and leaves the vectors as they are."""
    params, grads = start
    schedule = learning_rate(CONFIG, 0, 10)
    optimizer = make_optimizer(CONFIG, schedule, decay, SHAPES)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(grads, state, params)
    assert steps_made(state) == 1
    for path in SHAPES.keys() - set(REST):
        moved = np.asarray(updates[path], np.float64) + 0.01 * 0.1 * np.asarray(params[path], np.float64)
        for gradient, move in zip(as_matrices(path, grads[path]), as_matrices(path, moved), strict=True):
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            inner = left.T @ (-move / (0.01 * 0.2 * np.sqrt(max(gradient.shape)))) @ right.T
            values = np.diag(inner)
            assert 0.6 < values.min() and values.max() < 1.3, path
            np.testing.assert_allclose(inner, np.diag(values), rtol=0, atol=2e-2, err_msg=path)
    rest = {path: params[path] for path in REST}
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1 if decay == "all" else 0.0, nesterov=True)
    theirs, _ = adamw.update({path: grads[path] for path in REST}, adamw.init(rest), rest)
    for path in REST:
        np.testing.assert_allclose(updates[path], theirs[path], rtol=0, atol=1e-7, err_msg=path)


def test_the_gradient_is_clipped_first(start):
    """Muon takes no notice of the length of a gradient; AdamW's later updates do."""
    params, grads = start
    results = []
    for scale, norm in ((1.0, 1.0), (100.0, 1.0)):
        config = OptimizerConfig(opt_type="muon", base_lr=0.01, weight_decay=0.0, grad_clip_norm=norm)
        optimizer = make_optimizer(config, learning_rate(config, 0, 10), "all", SHAPES)
        state = optimizer.init(params)
        for factor in (scale, 1.0):
            updates, state = optimizer.update(jax.tree.map(lambda leaf, f=factor: f * leaf, grads), state, params)
        results.append(updates)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-6), *results)
