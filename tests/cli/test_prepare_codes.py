"""cli/prepare_codes.py: what `mindalle prepare-codes` takes, writes and prints."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from mindalle_jax.cli import main
from mindalle_jax.data.codes import vqgan_digest
from mindalle_jax.data.images import crop_square, decode_image
from mindalle_jax.data.samples import DataTask
from mindalle_jax.data.sources import open_source

SAMPLES = 6


@pytest.fixture
def data(tmp_path) -> Path:
    """Images with two captions each, the last of them damaged."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"image {number}\nthe same")
    path.write_bytes(path.read_bytes()[:60])
    return folder


def test_the_codes_are_those_of_the_model(data, tmp_path, tiny_dalle, tiny_model_folder, capsys):
    """stdout says what was written; the same command again changes nothing; codes have no codes."""
    command = ["prepare-codes", "--model", str(tiny_model_folder), "--batch-size", "4"]
    out = tmp_path / "out"
    assert main([*command, "--data", str(data), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: {SAMPLES - 1} samples\n"
    source = open_source(out, "text", vqgan=vqgan_digest(tiny_model_folder))
    images = np.stack([crop_square(decode_image(data / sample.id), 32, None) for sample in source.samples])
    expected = tiny_dalle.encode_images(images).reshape(len(source), -1)
    assert (np.stack([sample.codes for sample in source.samples]) == expected).all()

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([*command, "--data", str(data), "--out", str(out)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before

    assert main([*command, "--data", str(out), "--out", str(tmp_path / "again")]) == 2
    # Without the digest of a VQGAN codes are not opened, so this is told first.
    assert capsys.readouterr().err.splitlines()[-1].startswith("mindalle prepare-codes: ")
    assert not (tmp_path / "again").exists()


def test_help_shows_the_defaults_and_every_task(capsys):
    with pytest.raises(SystemExit):
        main(["prepare-codes", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 8)" in text and "(default: text)" in text and "Random crops, which training" in text
    assert f"{{{','.join(get_args(DataTask))}}}" in text
