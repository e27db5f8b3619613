"""interop/lpips.py: two files of PyTorch become the parameters of the network. Its numbers: models/test_lpips.py."""

import numpy as np
import pytest

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.lpips import read_lpips
from mindalle_jax.interop.torch_archive import write_torch_archive
from mindalle_jax.models.lpips import VGG_BLOCKS


def write(path, shapes):
    """Zeros, but for the first element of each tensor: its number in the file."""
    arrays = {}
    for number, (key, shape) in enumerate(shapes.items()):
        arrays[key] = np.zeros(shape, np.float16)
        arrays[key].flat[0] = number
    write_torch_archive(path, [(key, a.dtype, a.shape) for key, a in arrays.items()], arrays.__getitem__)
    return path


@pytest.fixture
def files(tmp_path):
    trunk, heads, inputs = {}, {}, 3
    for block, (channels, numbers) in enumerate(VGG_BLOCKS):
        for number in numbers:
            trunk |= {f"features.{number}.weight": (channels, inputs, 3, 3), f"features.{number}.bias": (channels,)}
            inputs = channels
        heads[f"lin{block}.model.1.weight"] = (1, channels, 1, 1)
    trunk["classifier.0.weight"] = (1, 1)
    return write(tmp_path / "vgg16.pth", trunk), write(tmp_path / "vgg.pth", heads)


def test_kernels_are_turned_and_the_classifier_is_left_out(files):
    params = read_lpips(*files)
    assert params["features_2"]["kernel"].shape == (3, 3, 64, 64) and params["features_2"]["kernel"].flat[0] == 2
    assert params["features_2"]["bias"][0] == 3 and params["lin4"].shape == (512,) and params["lin4"][0] == 4
    assert params["lin0"].dtype == np.float32 and len(params) == 13 + 5


def test_files_that_were_exchanged_are_refused(files):
    with pytest.raises(CheckpointError, match="is not the state dict of torchvision's vgg16"):
        read_lpips(files[1], files[0])
    with pytest.raises(CheckpointError, match="does not hold the linear layers of LPIPS"):
        read_lpips(files[0], files[0])
