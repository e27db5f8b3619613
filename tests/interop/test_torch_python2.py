"""Files that Python 2 wrote: their pickles have byte strings, which are read as text if they are ASCII.

lpips-0.1.4/vgg.pth is a file of the package lpips 0.1.4 (weights/v0.1/vgg.pth), with its license beside it.
"""

from pathlib import Path

import numpy as np
import pytest

from mindalle_jax.interop.torch_archive import TorchArchive

PUBLISHED = Path(__file__).with_name("lpips-0.1.4") / "vgg.pth"
CHANNELS = {"lin0": 64, "lin1": 128, "lin2": 256, "lin3": 512, "lin4": 512}


def test_the_published_file_of_lpips():
    with TorchArchive(PUBLISHED) as archive:
        found = {key: archive.read(ref) for key, ref in archive.state_dict().items()}
    assert {key: array.shape for key, array in found.items()} == {
        f"{name}.model.1.weight": (1, channels, 1, 1) for name, channels in CHANNELS.items()
    }
    assert all(array.dtype == np.float32 and (array >= 0).all() and array.max() > 0 for array in found.values())


def test_its_numbers_are_those_that_torch_reads():
    torch = pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")
    with TorchArchive(PUBLISHED) as archive:
        for key, tensor in torch.load(PUBLISHED, "cpu", weights_only=False, encoding="latin1").items():
            np.testing.assert_array_equal(archive.read(archive.state_dict()[key]), tensor.numpy())
