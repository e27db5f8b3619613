"""A run of `mindalle finetune`: its configuration, its batches, and the VQGAN that it shares with its previews."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training_runs import write_config, write_pictures

from mindalle_jax.config import file as config_file
from mindalle_jax.config.file import load_config
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.runtime.sharding import BATCH, make_mesh
from mindalle_jax.storage.weights import MANIFEST, fingerprint, load_params, read_manifest
from mindalle_jax.text.known_words import KnownWords, count_words, read_known_words
from mindalle_jax.training import finetune as module
from mindalle_jax.training.finetune import FinetuneRun, encode_batch, read_finetune


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eight captioned images. Read only."""
    return write_pictures(tmp_path_factory.mktemp("finetune") / "photos", 8)


@pytest.fixture
def config(tmp_path, tiny_model_folder, photos) -> Path:
    """One step, with validation and previews."""
    training = {"sample_every_steps": 1, "sample_prompts": ["the cat"], "remat": "none"}
    sections = {"data": {"valid": str(photos)}, "training": training, "optimizer": {"max_steps": 1}}
    return write_config(tmp_path / "run.yaml", tiny_model_folder, photos, **sections)


def test_the_file_is_read_once(config, monkeypatch, tiny_model_folder):
    """Its section `training` is needed before the model is known that lends the other sections their defaults."""
    read, names = config_file._read, []
    monkeypatch.setattr(config_file, "_read", lambda path: names.append(Path(path)) or read(path))
    found, base = read_finetune(config, ["optimizer.max_steps=3"])
    assert names == [config, tiny_model_folder / "config.yaml"]
    assert base == tiny_model_folder and found.optimizer.max_steps == 3 and found.stage1.n_embed == 80


def test_the_vqgan_is_loaded_once(config, tmp_path, monkeypatch, tiny_dalle):
    """Batches are encoded with it where they lie, and reconstructions and previews are given the same arrays."""
    load, loaded, shown = module.load_params, [], []

    def count(folder: Path, stage: str, *rest: Any) -> Any:
        loaded.append(stage)
        return load(folder, stage, *rest)

    monkeypatch.setattr(module, "load_params", count)
    monkeypatch.setattr(module, "write_reconstructions", lambda _, params, *rest, **more: shown.append(params) or 9.0)
    monkeypatch.setattr(
        module.Previewer, "write_samples", lambda _, params, *rest, **more: shown.append(params["stage1"])
    )
    run = FinetuneRun(*read_finetune(config, []), tmp_path / "out")
    state = run.init_state()
    rows = next(run.loader)
    batch = run.make_batch(dict(rows))
    told = run.preview_data()
    assert "reconstructs 8 of your images with 9.0 dB" in told[0] and "train the VQGAN on your images" in told[1]
    run.preview_samples(state, 1)
    assert loaded == ["stage1"] and len(shown) == 2 and all(params is run.stage1 for params in shown)
    assert sorted(batch) == ["codes", "index", "prefix"] and batch["codes"].shape == (1, 8, 64)
    assert batch["codes"].sharding.is_equivalent_to(batch["prefix"].sharding, 3)
    np.testing.assert_array_equal(batch["codes"][0], tiny_dalle.encode_images(rows["image"]).reshape(8, 64))


def test_the_fingerprint_is_that_of_the_weights(config, tmp_path, tiny_model_folder):
    run = FinetuneRun(*read_finetune(config, []), tmp_path / "out")
    assert run.base_fingerprint() == fingerprint(read_manifest(tiny_model_folder)["tensors"])


@pytest.mark.parametrize(
    ("before", "share", "after"),
    [(0.0, 0.0, 0.0), (0.0, 0.1, 0.1), (0.2, 0.1, 0.2), (None, 0.0, None), (None, 0.1, 0.1)],
)
def test_the_result_says_what_it_was_trained_on(config, tmp_path, tiny_model_folder, before, share, after):
    """Words of the captions join those of the model to start from, and so does the share of captions left out."""
    base = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    manifest = json.loads((base / MANIFEST).read_text(encoding="utf-8")) | {"caption_dropout": before}
    manifest = {key: value for key, value in manifest.items() if value is not None}
    (base / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    KnownWords(frozenset(["zeppelin"]), "draws zeppelins").save(base / "tokenizer")
    changes = [f"training.init_from={base}", f"training.caption_dropout={share}", "training.sample_every_steps=0"]
    run = FinetuneRun(*read_finetune(config, changes), tmp_path / "out")
    (tmp_path / "out").mkdir()
    run.write_result(run.init_state())
    assert read_manifest(tmp_path / "out").get("caption_dropout") == after
    known_words = read_known_words(tmp_path / "out" / "tokenizer")
    assert known_words is not None and known_words.about == ""
    captions = [caption for sample in run.source.samples for caption in sample.captions]
    assert known_words.words == {"zeppelin", *count_words(captions)} and len(known_words.words) > 1


def test_a_model_without_a_list_of_words_gets_none(config, tmp_path, tiny_model_folder):
    """The published model knows more words than a data set has."""
    run = FinetuneRun(*read_finetune(config, ["training.sample_every_steps=0"]), tmp_path / "out")
    (tmp_path / "out").mkdir()
    run.write_result(run.init_state())
    assert read_known_words(tmp_path / "out" / "tokenizer") is None


@pytest.fixture(scope="module")
def stage1(tiny_model_folder):
    """(encoder, mesh, params): the tiny VQGAN on four devices."""
    config = load_config(tiny_model_folder / "config.yaml")
    mesh = make_mesh("replicated", {}, jax.devices()[:4])
    params = load_params(tiny_model_folder, "stage1", config, np.dtype("float32"), mesh)
    return VQGAN(config.stage1), mesh, params


@pytest.mark.parametrize(("shape", "spec"), [((2, 4), PartitionSpec(None, BATCH)), ((4,), PartitionSpec(BATCH))])
def test_every_device_encodes_its_own_images(stage1, shape, spec):
    """No device sends anything to another one, and the codes lie where the images do."""
    encoder, mesh, params = stage1
    sharding = NamedSharding(mesh, spec)
    images = jax.ShapeDtypeStruct((*shape, 32, 32, 3), np.uint8, sharding=sharding)
    compiled = encode_batch.lower(encoder, params, images).compile()
    assert not re.search("all-|collective|reduce-scatter", compiled.as_text())
    assert compiled.output_shardings.is_equivalent_to(sharding, len(shape) + 1)
