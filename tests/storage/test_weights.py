"""weights.py: what is written is read back bit for bit, and what was damaged since is never taken for good."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mindalle_jax import Dalle
from mindalle_jax.errors import CheckpointError
from mindalle_jax.storage.weights import MANIFEST, check_tensors, read_manifest, read_weights, write_weights

SHAPES = {"blocks/fc/kernel": (3, 4, 5), "blocks/ln/scale": (3, 5), "head/kernel": (5, 7), "sos": (1, 5), "scalar": ()}


def random_bits(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Any bit patterns: NaNs with payload, infinities, denormals and minus zero are weights like others here."""
    itemsize = 2 if dtype != "float32" else 4
    data = np.random.default_rng(seed).integers(0, 256, (*shape, itemsize), np.uint8)
    return data.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)[..., 0]


def write_random(path: Path, dtype: str = "float32") -> tuple[dict, dict[str, np.ndarray]]:
    arrays = {name: random_bits(shape, dtype, i) for i, (name, shape) in enumerate(SHAPES.items())}
    chunks = (
        (name, part)
        for name, array in arrays.items()
        for part in (array if name.startswith("blocks/") else [array])  # layer by layer, and whole
    )
    return write_weights(path, SHAPES, chunks, dtype), arrays


def read_all(path: Path, tensors: dict) -> dict[str, np.ndarray]:
    parts: dict[str, list] = {}
    for name, layer, array in read_weights(path, tensors):
        assert (layer is None) != name.startswith("blocks/")
        assert layer is None or layer == len(parts.get(name, []))
        parts.setdefault(name, []).append(array)
    return {name: np.stack(p) if name.startswith("blocks/") else p[0] for name, p in parts.items()}


@pytest.fixture
def model(tmp_path, tiny_model_folder) -> Path:
    """A copy of the tiny converted model, to damage."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_back(tmp_path, dtype):
    manifest, arrays = write_random(tmp_path / "x.safetensors", dtype)
    assert [(name, entry["dtype"], tuple(entry["shape"])) for name, entry in manifest.items()] == [
        (name, dtype, shape) for name, shape in SHAPES.items()
    ]
    found = read_all(tmp_path / "x.safetensors", json.loads(json.dumps(manifest)))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_safetensors_library_reads_it_and_we_read_the_library(tmp_path, dtype):
    manifest, arrays = write_random(tmp_path / "x.safetensors", dtype)
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {name: array.tobytes() for name, array in found.items()} == {n: a.tobytes() for n, a in arrays.items()}
    assert {name: array.shape for name, array in found.items()} == SHAPES
    safetensors.numpy.save_file(found, tmp_path / "y.safetensors")
    again = read_all(tmp_path / "y.safetensors", manifest)
    assert {name: array.tobytes() for name, array in again.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_data_starts_aligned(tmp_path):
    """Readers map the file; safetensors promises 8 bytes."""
    write_random(tmp_path / "x.safetensors")
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write_random(tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_chunks_that_do_not_fill_a_tensor_are_a_bug(tmp_path):
    with pytest.raises(AssertionError, match=r"b: 8 bytes were given for shape \[3\]"):
        write_weights(tmp_path / "x", {"a": (1,), "b": (3,)}, [("a", np.zeros(1, "f4")), ("b", np.zeros(2, "f4"))])


# Damage


def data_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """First and last byte of each tensor in the file."""
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + header])
    return {name: tuple(8 + header + offset for offset in e["data_offsets"]) for name, e in entries.items()}


def flip(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def test_one_flipped_bit_anywhere_is_refused_by_name(tmp_path):
    """Every byte of every tensor; a checkpoint library restored 160 of 160 such files without a word."""
    path = tmp_path / "x.safetensors"
    manifest, _ = write_random(path)
    for name, (start, stop) in data_ranges(path).items():
        for position in range(start, stop):
            bit = position % 8
            flip(path, position, bit)
            with pytest.raises(
                CheckpointError, match=f"x.safetensors: {name} is damaged: CRC-32 .*copy the model again"
            ):
                read_all(path, manifest)
            flip(path, position, bit)
    read_all(path, manifest)


def test_the_last_part_of_a_damaged_tensor_is_not_given_out(tmp_path):
    """The check once came after it, so that a caller who took just as many parts as there are never saw it."""
    path = tmp_path / "x.safetensors"
    manifest, _ = write_random(path)
    flip(path, data_ranges(path)["blocks/fc/kernel"][0], 0)
    parts = read_weights(path, manifest)
    assert [next(parts)[:2], next(parts)[:2]] == [("blocks/fc/kernel", 0), ("blocks/fc/kernel", 1)]
    with pytest.raises(CheckpointError, match="blocks/fc/kernel is damaged"):
        next(parts)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_one_flipped_bit_keeps_a_model_from_loading(model, stage):
    path = model / f"{stage}.safetensors"
    ranges = data_ranges(path)
    rng = np.random.default_rng(0)
    for name in rng.choice(sorted(ranges), 3, replace=False):
        position, bit = int(rng.integers(*ranges[name])), int(rng.integers(8))
        flip(path, position, bit)
        with pytest.raises(CheckpointError, match=f"{stage}.safetensors: {name} is damaged: CRC-32"):
            Dalle.from_pretrained(model)
        flip(path, position, bit)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "x.safetensors"
    manifest, _ = write_random(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="x.safetensors: truncated or damaged"):
            read_all(path, manifest)


def test_more_bytes_than_announced_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    manifest, _ = write_random(path)
    with open(path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_all(path, manifest)


def test_a_flipped_bit_in_the_header_is_refused(tmp_path):
    """The header has no CRC of its own; whatever it becomes must not fit the manifest, or change nothing."""
    path = tmp_path / "x.safetensors"
    manifest, arrays = write_random(path)
    end = min(start for start, _ in data_ranges(path).values())
    for position in range(end):
        for bit in range(8):
            flip(path, position, bit)
            try:
                found = read_all(path, manifest)
            except CheckpointError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in arrays.items()}
            flip(path, position, bit)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.unlink(), "stage2.safetensors: missing"),
        (lambda path: path.write_bytes(b""), "stage2.safetensors: truncated or damaged"),
        (lambda path: path.write_text("<!DOCTYPE html><title>Sign in</title>"), "truncated or damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "truncated or damaged"),
        (lambda path: shutil.copyfile(path.with_name("stage1.safetensors"), path), "tensors differ from manifest.json"),
    ],
    ids=["missing", "empty", "web page", "folder", "other stage"],
)
def test_another_file_is_refused(model, make, message):
    make(model / "stage2.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Dalle.from_pretrained(model)


# The manifest


def test_the_manifest_describes_every_tensor(tiny_model_folder):
    manifest = read_manifest(tiny_model_folder)
    assert manifest["format_version"] == 1 and set(manifest["tensors"]) == {"stage1", "stage2"}
    for stage, tensors in manifest["tensors"].items():
        found = safetensors.numpy.load_file(tiny_model_folder / f"{stage}.safetensors")
        assert {n: (str(a.dtype), list(a.shape)) for n, a in found.items()} == {
            n: (e["dtype"], e["shape"]) for n, e in tensors.items()
        }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "<html>",
        "\0\0",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 1, "tensors": []}',
        '{"format_version": 1, "tensors": {}}',
        '{"format_version": 1, "tensors": {"stage2": {}}}',
        '{"format_version": 1, "tensors": {"stage1": {}, "../stage3": {}}}',
        '{"format_version": 1, "tensors": {"stage1": []}}',
        '{"format_version": 1, "tensors": {"stage1": {"a": 5}}}',
        '{"format_version": 1, "tensors": {"stage1": {"a": {"dtype": "float32", "crc32": 1}}}}',
        '{"format_version": 1, "tensors": {"stage1": {"a": {"dtype": "float32", "crc32": 1, "shape": 4}}}}',
        '{"format_version": 1, "tensors": {"stage1": {"a": {"dtype": "float32", "crc32": 1, "shape": [-4]}}}}',
        '{"format_version": 1, "tensors": {"stage1": {"a": {"dtype": "float32", "crc32": 1, "shape": [4.0]}}}}',
        '{"format_version": 1, "tensors": {"stage1": {"a": {"dtype": "float32", "crc32": "1", "shape": [4]}}}}',
        '{"format_version": 1, "tensors": {"stage1": {"a": {"dtype": "float64", "crc32": 1, "shape": [4]}}}}',
        '{"format_version": 1, "tensors": {"stage1": {"a": {"dtype": ["float32"], "crc32": 1, "shape": [4]}}}}',
        "[" * 100_000,
    ],
    ids=range(23),
)
def test_a_garbage_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json: not a manifest: ") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_manifest_that_is_not_text_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_bytes(os.urandom(4) + b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not a manifest"):
        read_manifest(tmp_path)


def test_a_missing_manifest_says_what_the_folder_is_not(tmp_path):
    with pytest.raises(CheckpointError, match="manifest.json: missing; .* is not a converted model"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(tmp_path, version):
    """Whatever else a later format changes: the version is looked at first."""
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": version, "tensors": ["other"]}))
    with pytest.raises(CheckpointError, match=f"format {version!r}; this version reads format 1"):
        read_manifest(tmp_path)


def edited(folder: Path, edit) -> Path:
    """The folder, its manifest changed by `edit(tensors)`."""
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest["tensors"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["stage2"].pop("head_img/weight"), "weights of stage2 do not fit config.yaml: head_img/weight"),
        (lambda t: t["stage2"].update(extra=t["stage2"]["ln_f/bias"]), "do not fit config.yaml: extra"),
        (lambda t: t["stage2"]["ln_f/bias"].update(shape=[4, 8]), "do not fit config.yaml: ln_f/bias"),
        (lambda t: t["stage1"]["codebook"].update(dtype="float16"), "codebook is F32 .* says float16"),
        (lambda t: t["stage1"]["codebook"].update(crc32=0), "codebook is damaged"),
        (lambda t: t.pop("stage2"), "holds a VQGAN only"),
    ],
    ids=["one missing", "one more", "shape", "dtype", "crc", "no stage2"],
)
def test_a_manifest_that_does_not_fit_is_refused(model, edit, message):
    with pytest.raises(CheckpointError, match=message):
        Dalle.from_pretrained(edited(model, edit))


def test_the_order_of_the_manifest_does_not_matter(model):
    def reverse(tensors):
        for stage in tensors:
            tensors[stage] = dict(reversed(tensors[stage].items()))

    Dalle.from_pretrained(edited(model, reverse))


def test_check_tensors_names_all_that_differ(tmp_path):
    tensors = {"a": {"shape": [1]}, "b": {"shape": [2]}, "c": {"shape": [3]}}
    assert list(check_tensors(tmp_path, "stage1", tensors, {"c": (3,), "a": (1,), "b": (2,)})) == ["c", "a", "b"]
    with pytest.raises(CheckpointError, match="stage1 do not fit config.yaml: b, c, d$"):
        check_tensors(tmp_path, "stage1", tensors, {"a": (1,), "b": (1,), "d": (4,)})
