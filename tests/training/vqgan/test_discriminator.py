"""The discriminator against the same network in PyTorch, and what GroupNorm in place of BatchNorm is for."""

import jax
import numpy as np
import pytest

from mindalle_jax.training.vqgan.discriminator import PatchDiscriminator


def random_discriminator(model: PatchDiscriminator, size: int, seed: int = 0):
    """Parameters off their initial values, logits of order one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, size, size, 3), np.float32))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, scale = path[-1].key, float(np.prod(leaf.shape[:-1])) ** -0.5
        draws = rng.standard_normal(leaf.shape).astype(np.float32)
        return {"kernel": draws * scale, "bias": 0.1 * draws, "scale": 1 + 0.2 * draws}[name].astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def logits(model: PatchDiscriminator, params, images) -> np.ndarray:
    # Run once: LLVM need not optimise what compiling takes longer than running.
    apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": "0"})
    return np.asarray(apply({"params": params}, images))


@pytest.mark.parametrize("layers, size", [(1, 12), (2, 16), (3, 40)])
def test_logits_agree_with_pytorch(layers, size):
    """A stride too many, a bias where the norm has one, the slope of LeakyReLU."""
    torch = pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")
    model = PatchDiscriminator(width=32, layers=layers)
    params = random_discriminator(model, size)
    images = np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)

    def conv(h, name, stride):
        kernel = torch.from_numpy(params[name]["kernel"].transpose(3, 2, 0, 1).copy())
        bias = torch.from_numpy(params[name]["bias"]) if "bias" in params[name] else None
        return torch.nn.functional.conv2d(h, kernel, bias, stride, padding=1)

    h = torch.from_numpy(images).permute(0, 3, 1, 2)
    h = torch.nn.functional.leaky_relu(conv(h, "conv_0", 2), 0.2)
    for layer in range(1, layers + 1):
        gain, bias = (torch.from_numpy(params[f"norm_{layer}"][name]) for name in ("scale", "bias"))
        h = torch.nn.functional.group_norm(conv(h, f"conv_{layer}", 2 if layer < layers else 1), 32, gain, bias, 1e-5)
        h = torch.nn.functional.leaky_relu(h, 0.2)
    theirs = conv(h, "conv_out", 1)[:, 0].numpy()
    ours = logits(model, params, images)
    assert ours.shape == (2, size // 2**layers - 2, size // 2**layers - 2) and ours.dtype == np.float32
    # Both sum the same float32 numbers in another order: 1e-6 was seen on logits of order 1.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_a_picture_is_judged_by_itself():
    """With BatchNorm its logits would depend on the pictures beside it, and so on how a batch is split."""
    model = PatchDiscriminator(width=32, layers=2)
    params = random_discriminator(model, 16)
    images = np.random.default_rng(2).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    alone = logits(model, params, images[1:2])
    # Other batch sizes may sum in another order.
    np.testing.assert_allclose(logits(model, params, images)[1:2], alone, rtol=0, atol=1e-5)
    assert set(jax.eval_shape(model.init, jax.random.key(0), images)) == {"params"}
