"""data/prepare.py: codes are computed of images alone, and what was written is read back."""

import numpy as np
import pytest
from PIL import Image

from mindalle_jax.data.prepare import open_images, prepare_codes
from mindalle_jax.errors import DataError, UsageError


class FourCodes:
    """A codec that computes 2 x 2 codes of 16 x 16 images without a network: the first pixels."""

    size, side, vocab_size = 16, 2, 256

    def encode(self, images, *, batch_size):
        return images[:, :2, :2, 0].astype(np.int32)


def test_codes_are_written_and_read_back(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    source = open_images(str(tmp_path / "images"), "unconditional")
    report = prepare_codes(source, FourCodes(), tmp_path / "codes", vqgan="a" * 64, batch_size=2)
    assert str(report) == "3 samples"
    shard = tmp_path / "codes" / "00000.npy"
    np.testing.assert_array_equal(np.load(shard), np.repeat([[0], [1], [2]], 4, axis=1))

    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")  # what was written is not what is read
    with pytest.raises(DataError, match="damaged, its CRC-32"):
        prepare_codes(source, FourCodes(), tmp_path / "codes", vqgan="a" * 64)
    with pytest.raises(UsageError, match="holds codes"):
        open_images(str(tmp_path / "codes"), "unconditional")
