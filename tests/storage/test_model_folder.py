"""save_pretrained and copy_model: the weights on disk again, all of them, bit for bit or in the dtype asked for."""

import collections
import errno
import json
import os
import shutil
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mindalle_jax import Dalle, ImageGPT, cli
from mindalle_jax.errors import CheckpointError, OutputError, UsageError
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.storage import model_folder
from mindalle_jax.storage.model_folder import copy_model
from mindalle_jax.storage.weights import MANIFEST, leaf_shapes, read_manifest, write_weights


def leaves(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model folder."""
    return {
        f"{stage}/{name}": array
        for stage in read_manifest(folder)["tensors"]
        for name, array in safetensors.numpy.load_file(folder / f"{stage}.safetensors").items()
    }


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert set(first) == set(second)
    for name, array in first.items():
        assert (second[name].dtype, second[name].shape) == (array.dtype, array.shape), name
        assert second[name].tobytes() == array.tobytes(), name


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def rewrite(folder: Path, stage: str, config, arrays: dict[str, np.ndarray], dtype: str) -> None:
    """Puts other weights into a model folder."""
    shapes = leaf_shapes(config, stage)
    (folder / f"{stage}.safetensors").unlink()
    manifest = read_manifest(folder)
    chunks = ((name, arrays[f"{stage}/{name}"]) for name in shapes)
    manifest["tensors"][stage] = write_weights(folder / f"{stage}.safetensors", shapes, chunks, dtype)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def model(tmp_path, tiny_model_folder) -> Path:
    """A copy of the tiny converted model, to change."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def test_a_saved_model_is_the_same_folder(tiny_dalle, tiny_model_folder, tmp_path):
    tiny_dalle.save_pretrained(tmp_path / "a" / "deep")
    saved = tmp_path / "a" / "deep"
    assert tree(saved) == tree(tiny_model_folder)
    for name in tree(saved):
        assert (saved / name).is_dir() or (saved / name).read_bytes() == (tiny_model_folder / name).read_bytes()
    codes = [m.generate_codes("a cat", num_candidates=2) for m in (tiny_dalle, Dalle.from_pretrained(saved))]
    np.testing.assert_array_equal(*codes)


def test_nothing_is_lost_by_how_the_model_was_loaded(tiny_igpt_model_folder, tmp_path):
    """In bfloat16 two thirds of each float32 weight are gone from memory, and from what a naive save writes."""
    ImageGPT.from_pretrained(tiny_igpt_model_folder, dtype="bfloat16").save_pretrained(str(tmp_path / "a"))
    assert_same_bits(leaves(tiny_igpt_model_folder), leaves(tmp_path / "a"))
    assert not (tmp_path / "a" / "tokenizer").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_rounded_once_and_kept_after(tiny_model_folder, tmp_path, capsys, dtype):
    report = copy_model(tiny_model_folder, tmp_path / "a", dtype=dtype)
    expected = {name: array.astype(dtype) for name, array in leaves(tiny_model_folder).items()}
    assert_same_bits(expected, leaves(tmp_path / "a"))
    stage1 = "stage1.safetensors"
    assert (tmp_path / "a" / stage1).stat().st_size < 0.51 * (tiny_model_folder / stage1).stat().st_size
    assert report.weight_bytes == 2 * report.parameters
    copy_model(tmp_path / "a", tmp_path / "b")
    assert_same_bits(expected, leaves(tmp_path / "b"))
    copy_model(tmp_path / "a", tmp_path / "c", dtype="float32")
    assert_same_bits({name: array.astype("float32") for name, array in expected.items()}, leaves(tmp_path / "c"))
    assert "copying: 100%" in capsys.readouterr().err
    old, new = (read_manifest(folder) for folder in (tiny_model_folder, tmp_path / "a"))
    assert {**old, "tensors": 0} == {**new, "tensors": 0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_half_the_size_draws(tiny_dalle, tmp_path, dtype):
    """Computed in float32, from weights that were rounded once: as good as the codes of the rounded weights can be."""
    tiny_dalle.save_pretrained(tmp_path / "a", dtype=dtype)
    copy_model(tmp_path / "a", tmp_path / "b", dtype="float32")
    codes = [Dalle.from_pretrained(tmp_path / x).generate_codes("a cat", num_candidates=2) for x in "ab"]
    np.testing.assert_array_equal(*codes)


def test_from_pytorch_straight_into_another_dtype(tiny_folder, tiny_model_folder, tmp_path):
    """As by way of float32."""
    report = import_checkpoint(tiny_folder, tmp_path / "a", dtype="bfloat16")
    copy_model(tiny_model_folder, tmp_path / "b", dtype="bfloat16")
    assert read_manifest(tmp_path / "a")["tensors"] == read_manifest(tmp_path / "b")["tensors"]
    assert report.weight_bytes == 2 * report.parameters


def test_files_of_mixed_dtypes_lose_nothing(model, tmp_path, tiny_config):
    """One stage in float16, and one whose tensors differ, as another program may write them: the manifest allows it."""
    arrays = leaves(model)
    rewrite(model, "stage1", tiny_config, {k: v.astype(np.float16) for k, v in arrays.items()}, "float16")
    mixed = {
        name.removeprefix("stage2/"): array.astype(np.float16 if i % 2 else ml_dtypes.bfloat16)
        for i, (name, array) in enumerate(arrays.items())
        if name.startswith("stage2/")
    }
    safetensors.numpy.save_file(mixed, model / "stage2.safetensors")
    manifest = read_manifest(model)
    for name, entry in manifest["tensors"]["stage2"].items():
        entry |= {"dtype": mixed[name].dtype.name, "crc32": zlib.crc32(mixed[name].tobytes())}
    (model / MANIFEST).write_text(json.dumps(manifest))
    copy_model(model, tmp_path / "a")
    found = leaves(tmp_path / "a")
    expected = {f"stage2/{name}": array.astype(np.float32) for name, array in mixed.items()}
    assert_same_bits(expected, {name: array for name, array in found.items() if name in expected})
    assert {array.dtype.name for name, array in found.items() if name.startswith("stage1")} == {"float16"}


def test_a_vqgan_alone_is_copied(tiny_folder, tmp_path):
    shutil.copyfile(tiny_folder / "stage1_last.ckpt", tmp_path / "vqgan.ckpt")
    import_checkpoint(tmp_path / "vqgan.ckpt", tmp_path / "a", config=tiny_folder / "config.yaml")
    copy_model(tmp_path / "a", tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert_same_bits(leaves(tmp_path / "a"), leaves(tmp_path / "b"))


# What is refused; nothing is left behind


def refused(error: type[Exception], match: str, source: Path, target: Path, **options) -> None:
    before = tree(target.parent)
    with pytest.raises(error, match=match) as caught:
        copy_model(source, target, **options)
    assert "\n" not in str(caught.value) and tree(target.parent) == before


@pytest.mark.parametrize(
    ("fits", "beyond", "dtype"),
    [(65519, 65520, "float16"), (-65519, -65520, "float16"), (3.38e38, 3.4e38, "bfloat16"), (0, np.nan, "bfloat16")],
)
def test_a_value_beyond_the_dtype_is_refused_by_name(model, tmp_path, tiny_config, fits, beyond, dtype):
    """float16 ends at 65504: 65519 is rounded to it, and 65520 to infinity."""
    arrays = leaves(model)
    arrays["stage2/blocks/qkv/bias"][1, 2, 3] = fits
    rewrite(model, "stage2", tiny_config, arrays, "float32")
    copy_model(model, tmp_path / "fits", dtype=dtype)
    arrays["stage2/blocks/qkv/bias"][1, 2, 3] = beyond
    rewrite(model, "stage2", tiny_config, arrays, "float32")
    match = rf"model/stage2.safetensors: blocks/qkv/bias holds NaN or infinite values \(in {dtype}\)"
    refused(CheckpointError, match, model, tmp_path / "a", dtype=dtype)


def test_a_flipped_bit_is_refused(model, tmp_path):
    data = bytearray((model / "stage2.safetensors").read_bytes())
    data[-5] ^= 1
    (model / "stage2.safetensors").write_bytes(data)
    refused(CheckpointError, "is damaged: CRC-32", model, tmp_path / "a")


@pytest.mark.parametrize("dtype", ["float64", "int8", "f4", ""])
def test_another_dtype_than_the_three_is_refused(model, tmp_path, tiny_folder, dtype):
    match = f"the dtype of weights must be one of float32, float16, bfloat16, not '{dtype}'"
    refused(UsageError, match, model, tmp_path / "a", dtype=dtype)
    with pytest.raises(UsageError, match=match):
        import_checkpoint(tiny_folder, tmp_path / "a", dtype=dtype)


def test_a_target_is_replaced_only_when_told_and_never_the_source(model, tmp_path, tiny_model_folder):
    target = Path(shutil.copytree(tiny_model_folder, tmp_path / "target"))
    (target / "old").write_text("old")
    refused(OutputError, "exists already", model, target)
    copy_model(model, target, overwrite=True)
    assert tree(target) == tree(model)
    (tmp_path / "link").symlink_to(model)
    for place in (model, tmp_path / "link"):
        refused(OutputError, "is, or holds, the source of the conversion", model, place, overwrite=True)
    # A folder of links, as in the cache of the hub: what they lead to is the source as well.
    links = tmp_path / "links"
    links.mkdir()
    for path in model.iterdir():
        (links / path.name).symlink_to(path)
    refused(OutputError, "is, or holds, the source of the conversion", links, model, overwrite=True)
    copy_model(links, tmp_path / "copy")
    for _ in range(2):  # a place within the source is none that holds it
        copy_model(model, model / "within", overwrite=True)
    shutil.rmtree(model / "within")
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    assert_same_bits(leaves(model), leaves(tmp_path / "copy"))


def test_too_little_disk_is_told_first_and_half_the_size_needs_half(model, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    need = 4 * copy_model(model, tmp_path / "whole").parameters + (64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, need - 1))
    refused(OutputError, "the copy of the model needs 0.1 GB", model, tmp_path / "a")
    copy_model(model, tmp_path / "a", dtype="bfloat16")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing(model, tmp_path, monkeypatch, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(model_folder, "in_dtype", stop)
    before = tree(tmp_path)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        copy_model(model, tmp_path / "deep" / "a", dtype="bfloat16")
    assert tree(tmp_path) == before


# The command line


def test_convert_dtype(model, tmp_path, capsys, tiny_folder):
    def convert(*arguments) -> int:
        return cli.main(["convert", *(str(argument) for argument in arguments)])

    assert convert(model, tmp_path / "a", "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a'}: ")
    assert {array.dtype.name for array in leaves(tmp_path / "a").values()} == {"bfloat16"}
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    assert_same_bits(leaves(tmp_path / "a"), leaves(tmp_path / "b"))
    assert convert(tiny_folder, tmp_path / "c", "--dtype", "float16") == 0
    assert {array.dtype.name for array in leaves(tmp_path / "c").values()} == {"float16"}
    assert convert(tmp_path / "c", tmp_path / "d", "--to", "torch", "--dtype", "float32") == 2
    assert convert(tmp_path / "c", tmp_path / "d", "--config", tiny_folder / "config.yaml") == 2
    assert not (tmp_path / "d").exists()
