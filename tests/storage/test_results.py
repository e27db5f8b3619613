"""storage/results.py: what a run writes is a model that loads, and takes the place of an older one at once."""

import shutil

import numpy as np
import pytest

from mindalle_jax.config.file import load_config
from mindalle_jax.storage.results import write_model, write_vqgan
from mindalle_jax.storage.weights import leaf_shapes, map_weights, read_manifest


def test_stage_2_is_new_and_all_else_that_of_the_base(tiny_model_folder, tmp_path):
    config = load_config(tiny_model_folder / "config.yaml")
    before = read_manifest(tiny_model_folder)["tensors"]
    for number in (1.0, 2.0):  # the second time the folder holds an older result
        write_model(tiny_model_folder, config, tmp_path, lambda path, shape, n=number: np.full(shape, n), "a test")
        manifest = read_manifest(tmp_path)
        assert manifest["source"] == "a test" and manifest["tensors"]["stage1"] == before["stage1"]
        leaves = map_weights(tmp_path / "stage2.safetensors", manifest["tensors"]["stage2"])
        assert leaves.keys() == leaf_shapes(config, "stage2").keys()
        assert all((leaf == number).all() for leaf in leaves.values())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in tiny_model_folder.iterdir()}


def test_what_is_not_finite_is_never_saved(tiny_model_folder, tmp_path):
    config = load_config(tiny_model_folder / "config.yaml")
    with pytest.raises(AssertionError, match="is not finite and would be saved"):
        write_model(tiny_model_folder, config, tmp_path, lambda _, shape: np.full(shape, np.nan), "a test")
    assert not (tmp_path / "manifest.json").exists()


def test_a_vqgan_alone(tiny_config, tmp_path):
    shapes = leaf_shapes(tiny_config, "stage1")
    write_vqgan(tiny_config, tmp_path, {path: np.ones(shape, np.float32) for path, shape in shapes.items()}, "a test")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "manifest.json", "stage1.safetensors"]
    assert list(read_manifest(tmp_path)["tensors"]) == ["stage1"]
    shutil.rmtree(tmp_path)
