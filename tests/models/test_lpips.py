"""LPIPS and its reader against the same network in PyTorch, with random weights."""

import functools

import jax
import numpy as np
import pytest

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.lpips import read_lpips
from mindalle_jax.models.lpips import LPIPS

# torchvision's vgg16.features: channels of the convolutions by their number; pools are at 4, 9, 16 and 23.
CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512,
                28: 512}  # fmt: skip
TAPS = (3, 8, 15, 22, 29)
"""The ReLUs whose output is compared: relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""


# Run once: LLVM need not optimise what compiling takes longer than running. Weights are arguments, not constants.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")


@pytest.fixture(scope="module")
def weights(torch):
    """(state dict of vgg16, state dict of the linear layers), random."""
    generator = torch.Generator().manual_seed(0)
    trunk, inputs = {}, 3
    for number, channels in CONVOLUTIONS.items():
        draw = torch.randn(channels, inputs, 3, 3, generator=generator)
        trunk[f"features.{number}.weight"] = draw * (2 / (9 * inputs)) ** 0.5
        trunk[f"features.{number}.bias"] = 0.1 * torch.randn(channels, generator=generator)
        inputs = channels
    widths = (64, 128, 256, 512, 512)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for i, width in enumerate(widths)
    }
    return trunk, heads


@pytest.fixture(scope="module")
def files(torch, weights, tmp_path_factory):
    """The two files as people have them; that of vgg16 has its classifier."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(weights[0] | {"classifier.0.weight": torch.zeros(4, 4)}, folder / "vgg16.pth")
    torch.save(weights[1], folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def torch_lpips(torch, weights, first, second):
    """As published: features of unit length, squared differences weighted by channel, means over positions, summed."""
    trunk, heads = weights
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)

    def features(h):
        h, taps = (h - shift) / scale, []
        for number in range(30):
            if number in CONVOLUTIONS:
                weight, bias = trunk[f"features.{number}.weight"], trunk[f"features.{number}.bias"]
                h = torch.nn.functional.conv2d(h, weight, bias, padding=1)
            elif number in (4, 9, 16, 23):
                h = torch.nn.functional.max_pool2d(h, 2)
            else:
                h = torch.relu(h)
            if number in TAPS:
                taps.append(h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    total = 0
    for i, (a, b) in enumerate(zip(features(first), features(second), strict=True)):
        total = total + torch.nn.functional.conv2d((a - b) ** 2, heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    return total


def test_distance_and_gradient_agree_with_pytorch(torch, weights, files):
    params = read_lpips(*files)
    rng = np.random.default_rng(0)
    first, second = rng.uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32)

    def total(second, params):
        distance = LPIPS().apply({"params": params}, first, second)
        return distance.sum(), distance

    gradient, ours = compiled(jax.grad(total, has_aux=True))(second, params)
    their_second = torch.from_numpy(second).permute(0, 3, 1, 2).requires_grad_()
    theirs = torch_lpips(torch, weights, torch.from_numpy(first).permute(0, 3, 1, 2), their_second)
    theirs.sum().backward()
    assert ours.shape == (2,) and float(ours.min()) > 0.1
    # Sums of thousands of float32 products in another order: 1e-6 of the value was seen.
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5)
    their_gradient = their_second.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, their_gradient, rtol=0, atol=1e-4 * np.abs(their_gradient).max())


def test_equal_pictures_have_no_distance_and_a_finite_gradient(files):
    """The length of features that are all 0 has no gradient; black pictures are such a case."""
    params = jax.tree.map(lambda leaf: np.abs(leaf) * (leaf.ndim == 1), read_lpips(*files))
    params |= {name: jax.tree.map(np.zeros_like, leaf) for name, leaf in params.items() if "features" in name}
    images = np.zeros((1, 16, 16, 3), np.float32)
    distance = compiled(jax.value_and_grad(lambda params, x: LPIPS().apply({"params": params}, images, x).sum(), 1))
    value, gradient = distance(params, images)
    assert value == 0 and np.isfinite(gradient).all()


def test_files_that_do_not_fit_are_refused(torch, weights, files, tmp_path):
    """All that is wrong in one message: the files exchanged, and vgg16 with BatchNorm."""
    with pytest.raises(CheckpointError, match="vgg.pth: is not the state dict of torchvision's vgg16(.|\n)*missing"):
        read_lpips(files[1], files[1])
    with pytest.raises(CheckpointError, match=r"does not hold the linear layers(.|\n)*lin0\.model\.1\.weight"):
        read_lpips(files[0], files[0])
    torch.save(weights[0] | {"features.1.running_mean": torch.zeros(64)}, tmp_path / "vgg16_bn.pth")
    with pytest.raises(CheckpointError, match="unexpected  features.1.running_mean"):
        read_lpips(tmp_path / "vgg16_bn.pth", files[1])
    with pytest.raises(CheckpointError, match="nothing.pth"):
        read_lpips(tmp_path / "nothing.pth", files[1])
