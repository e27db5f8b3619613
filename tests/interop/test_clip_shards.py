"""CLIP models whose weights are split into several files, with an index."""

import json
from pathlib import Path

import clip_oracle
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindalle_jax.errors import CheckpointError
from mindalle_jax.hub import resolve
from mindalle_jax.interop.clip import read_clip, write_clip
from mindalle_jax.interop.torch_archive import write_torch_archive


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip_oracle.random_model("quick-gelu", tmp_path_factory.mktemp("words"))


def split(folder: Path, extension: str, parts: int = 3) -> Path:
    """Splits model.safetensors into files of this extension; returns the index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if extension == ".safetensors" else "pytorch_model"
    weight_map = {}
    for part in range(parts):
        some = {key: array for number, (key, array) in enumerate(state.items()) if number % parts == part}
        name = f"{stem}-{part + 1:05d}-of-{parts:05d}{extension}"
        if extension == ".safetensors":
            save_file(some, folder / name)
        else:
            specs = [(key, array.dtype, array.shape) for key, array in some.items()]
            write_torch_archive(folder / name, specs, some.__getitem__)
        weight_map |= dict.fromkeys(some, name)
    index = folder / f"{stem}{extension}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.fixture
def folder(model, tmp_path) -> Path:
    write_clip(tmp_path / "clip", model)
    return tmp_path / "clip"


@pytest.mark.parametrize("extension", [".safetensors", ".bin"])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_weights_are_those_of_one_file(model, folder, extension, parts):
    split(folder, extension, parts)
    jax.tree.map(np.testing.assert_array_equal, read_clip(folder).params, model.params)


def damage(index: Path, kind: str) -> None:
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    first = next(iter(content["weight_map"]))
    if kind == "a missing file":
        (index.parent / names[1]).unlink()
    elif kind == "a damaged file":
        (index.parent / names[2]).write_bytes(b"x" * 100)
    elif kind == "a tensor twice":
        save_file(load_file(index.parent / names[0]), index.parent / names[1])
    elif kind == "a tensor in none":
        state = load_file(index.parent / names[0])
        save_file({key: array for key, array in state.items() if key != min(state)}, index.parent / names[0])
    elif kind in ("../x", "/etc/passwd", "a/b"):
        content["weight_map"][first] = kind
        index.write_text(json.dumps(content))
    else:
        index.write_text(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a missing file", "lists model-00002-of-00003.safetensors, which is missing"),
        ("a damaged file", "model-00003-of-00003.safetensors: truncated or damaged"),
        ("a tensor twice", "model-00002-of-00003.safetensors: .* is in another file, too"),
        ("a tensor in none", "does not fit config.json"),
        ("../x", "lists a file in another folder"),
        ("/etc/passwd", "lists a file in another folder"),
        ("a/b", "lists a file in another folder"),
        ("{}", "has no weight_map"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
        ("{", "cannot be read"),
    ],
)
def test_what_does_not_work_is_one_sentence(folder, kind, message):
    damage(split(folder, ".safetensors"), kind)
    with pytest.raises(CheckpointError, match=message):
        read_clip(folder)


@pytest.mark.parametrize("extension", [".safetensors", ".bin"])
def test_the_hub_is_asked_for_all_files(folder, monkeypatch, tmp_path, extension):
    index = split(folder, extension)
    fetched = tmp_path / "hub"
    fetched.mkdir()

    def fetch(name: str, patterns: list[str], **_) -> Path:
        for pattern in patterns:
            for file in folder.glob(pattern):
                (fetched / file.name).write_bytes(file.read_bytes())
        return fetched

    monkeypatch.setattr(resolve, "fetch_repo", fetch)
    read_clip(resolve.find_clip("pets/clip"))
    assert (fetched / index.name).is_file() and len(list(fetched.glob(f"*-of-*{extension}"))) == 3
