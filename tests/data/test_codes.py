"""data/codes.py: codes computed once, never half, never of another VQGAN."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindalle_jax.data import codes as codes_module
from mindalle_jax.data.codes import code_samples, vqgan_digest, write_codes
from mindalle_jax.data.images import crop_square, decode_image
from mindalle_jax.data.loader import Loader
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import DataError, OutputError, UsageError

ROOT = Path(__file__).parents[2]
SAMPLES = 23


class FourCodes:
    """A codec that computes 2 x 2 codes of 16 x 16 pictures without a network: the first pixels."""

    size, side, vocab_size = 16, 2, 256

    def __init__(self):
        self.encoded = 0

    def encode(self, images, *, batch_size):
        assert images.shape == (batch_size, 16, 16, 3) and images.dtype == np.uint8
        self.encoded += 1
        return images[:, :2, :2, 0].astype(np.int32)


@pytest.fixture
def data(tmp_path) -> Path:
    """Pictures with two captions each, one of them damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        path = folder / f"{number:02}.png"
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}\nthe same")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(codes_module, "SHARD_SAMPLES", 5)


def write(data: Path, out: Path, codec=None, **options) -> None:
    options = {"vqgan": "a" * 64, "batch_size": 4} | options
    write_codes(open_source(data, "text"), codec or FourCodes(), out, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_written_is_read(data, tmp_path):
    """The middle of each picture, all captions, without the damaged one."""
    write(data, tmp_path / "out")
    source = open_source(tmp_path / "out", "text", vqgan="a" * 64)
    assert source.has_codes and len(source) == SAMPLES - 1
    assert "07.png" not in [sample.id for sample in source.samples]
    for sample in source.samples:
        image = crop_square(decode_image(data / sample.id), 16, None)
        assert sample.codes.tolist() == image[:2, :2, 0].reshape(-1).tolist()
        assert sample.captions == [f"picture {int(sample.id[:2])}", "the same"]
        assert isinstance(sample.codes.base, np.memmap)
    assert sorted(files(tmp_path / "out")) == sorted(
        ["codes.json", *(f"{shard:05}.{end}" for shard in range(5) for end in ("npy", "json"))]
    )
    batch = next(Loader(source, batch_size=6, train=True))
    assert set(batch) == {"index", "sample", "codes"}
    assert batch["codes"].dtype == np.int32 and batch["codes"].shape == (6, 4)
    assert all((source[n].codes == row).all() for n, row in zip(batch["sample"], batch["codes"], strict=True))


def test_classes_are_kept(data, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        os.rename(data / f"0{'dc'.index(name[0])}.png", tmp_path / "classes" / name / f"{name}.png")
        Image.new("RGB", (16, 16)).save(tmp_path / "classes" / name / "x.png")
    write_codes(open_source(tmp_path / "classes", "class"), FourCodes(), tmp_path / "out", vqgan="v", batch_size=2)
    source = open_source(tmp_path / "out", "class", vqgan="v", num_classes=2, classes=["cat", "dog"])
    assert [sample.label for sample in source.samples] == [0, 0, 1, 1] and source.classes == ["cat", "dog"]
    assert set(next(Loader(source, batch_size=2, train=False))) == {"index", "sample", "codes", "label", "valid"}
    with pytest.raises(DataError, match="its 2 classes are not the 3 classes of the training data"):
        open_source(tmp_path / "out", "class", vqgan="v", classes=["ant", "cat", "dog"])


def test_a_shard_of_damaged_pictures_only(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(7):
        Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / f"{number}.png")
    for number in (5, 6):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(b"")
    write_codes(
        open_source(tmp_path / "pictures", "unconditional"), FourCodes(), tmp_path / "o", vqgan="v", batch_size=2
    )
    assert len(open_source(tmp_path / "o", "unconditional", vqgan="v")) == 5


def test_killed_and_resumed(data, tmp_path):
    """kill -9 in the third shard: nothing half-written counts, what was done is not done again, the end is the same."""
    script = f"""
        import os, signal, sys
        sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]!r}
        import test_codes as t
        from pathlib import Path
        t.codes_module.SHARD_SAMPLES = 5
        class Killed(t.FourCodes):
            def encode(self, images, *, batch_size):
                if self.encoded == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().encode(images, batch_size=batch_size)
        t.write(Path({str(data)!r}), Path({str(tmp_path / "out")!r}), Killed())
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(files(tmp_path / "out")) == ["00000.json", "00000.npy", "00001.json", "00001.npy", "codes.json"]
    with pytest.raises(
        DataError, match="3 of 5 shards are missing; run the same mindalle prepare-codes command again to resume"
    ):
        open_source(tmp_path / "out", "text", vqgan="a" * 64)
    # As a kill in the middle of a write leaves it.
    (tmp_path / "out" / ".00002.npy.partial").write_bytes(b"\x93NUMPY")
    (tmp_path / "out" / "00002.npy").write_bytes(b"\x93NUMPY")
    codec = FourCodes()
    write(data, tmp_path / "out", codec, batch_size=3)
    assert codec.encoded == 2 + 2 + 1
    write(data, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    write(data, tmp_path / "out", codec)
    assert codec.encoded == 5, "complete: nothing is done again"


def test_nothing_is_overwritten_or_mixed(data, tmp_path):
    write(data, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(OutputError, match="out: holds codes that differ from these in vqgan; name another folder"):
        write(data, tmp_path / "out", vqgan="b" * 64)
    (data / "00.txt").write_text("another caption")
    with pytest.raises(OutputError, match="differ from these in data;"):
        write(data, tmp_path / "out")
    assert files(tmp_path / "out") == before
    with pytest.raises(OutputError, match="is not empty"):
        write(data, data)
    with pytest.raises(OutputError, match="00.txt exists already"):
        write(data, data / "00.txt")


def test_codes_of_another_vqgan(data, tmp_path):
    write(data, tmp_path / "out")
    with pytest.raises(DataError, match=r"codes of another VQGAN \(aaaaaaaa\) than that of the model \(bbbbbbbb\)"):
        open_source(tmp_path / "out", "text", vqgan="b" * 64)
    with pytest.raises(UsageError, match="holds codes, which only mindalle finetune reads"):
        open_source(tmp_path / "out", "text")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("00001.npy", lambda data: data[:-3] + b"xyz", "00001.npy: damaged, its CRC-32 is not the one"),
        ("00001.npy", lambda data: data[:-1], "00001.npy: cannot be read"),
        ("00001.npy", lambda data: b"", "00001.npy: cannot be read"),
        ("00001.npy", lambda data: data.replace(b"(4, 4)", b"(2, 8)"), "which its .json does not describe"),
        ("00001.json", lambda data: data[:-9], "00001.json: cannot be read"),
        ("00001.json", lambda data: b"{}", "00001.npy: cannot be read: 'crc32'"),
        ("codes.json", lambda data: data.replace(b'"vqgan"', b'"vqgam"'), "codes.json: damaged: .*'vqgam'"),
        ("codes.json", lambda data: b"[]", "codes.json: not a JSON object"),
        (
            "codes.json",
            lambda data: data.replace(b'version": 1', b'version": 2'),
            "format 2; this version reads format 1",
        ),
    ],
)
def test_damaged_codes(data, tmp_path, file, damage, message):
    write(data, tmp_path / "out")
    path = tmp_path / "out" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        list(code_samples(tmp_path / "out", "a" * 64)[0])


def test_the_digest_is_that_of_the_vqgan(tiny_model_folder, tiny_igpt_model_folder, tmp_path):
    """Two models share a VQGAN when weights and configuration are equal, whatever their second stage is."""
    digest = vqgan_digest(tiny_model_folder)
    assert digest == vqgan_digest(tiny_igpt_model_folder) and len(digest) == 64
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / name).write_bytes((tiny_model_folder / name).read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    next(iter(manifest["tensors"]["stage1"].values()))["crc32"] ^= 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert vqgan_digest(tmp_path) != digest
