"""Writes the weights that a run has trained into its folder, and copies the rest from the base model."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import mindalle_jax
from mindalle_jax.config.file import dump_config
from mindalle_jax.config.schema import Config
from mindalle_jax.storage import weights
from mindalle_jax.storage.files import check_free_disk
from mindalle_jax.storage.weights import (
    FORMAT_VERSION,
    check_tensors,
    count_parameters,
    leaf_shapes,
    read_manifest,
    write_weights,
)
from mindalle_jax.text.known_words import read_known_words


def write_model(
    base: Path,
    config: Config,
    folder: Path,
    leaf: Callable[[str, tuple[int, ...]], np.ndarray],
    source: str,
    *,
    card: str | None = None,
    caption_dropout: float | None = None,
    captions: Iterable[str] = (),
) -> None:
    """Writes a model into an existing folder: stage 2 from leaf(path, shape), and missing files from the model `base`.

    card: text of README.md; None copies that of the base.
    leaf: returns a float32 array by path and shape. source: the manifest's text about where the weights come from.
    caption_dropout: entry of the manifest (see read_manifest); None leaves it out. captions: captions of the training;
    their words are added to the tokenizer's list of words, if it has one.

    The old manifest is removed before the new weights are there, and the new one appears last. So a folder never has a
    manifest of other weights: after a kill it holds a model, or a run that its command resumes. Raises OutputError if
    the disk is too small, and CheckpointError for a damaged base.
    """
    shapes = leaf_shapes(config, "stage2")
    stage1_bytes = (base / "stage1.safetensors").stat().st_size
    check_free_disk(folder, 4 * count_parameters(config, "stage2") + stage1_bytes, "the fine-tuned model")
    manifest = read_manifest(base)
    stage1 = check_tensors(base, "stage1", manifest["tensors"]["stage1"], leaf_shapes(config, "stage1"))

    def chunks() -> Iterator[tuple[str, np.ndarray]]:
        for path, shape in shapes.items():
            array = np.asarray(leaf(path, shape), np.float32)
            if not np.isfinite(array.min() + array.max()):
                raise AssertionError(f"{path} is not finite and would be saved")
            yield path, array

    partial = folder / "stage2.safetensors.partial"
    partial.unlink(missing_ok=True)
    stage2 = write_weights(partial, shapes, chunks())
    for name in ("LICENSE", *(["README.md"] if card is None else [])):
        if (base / name).is_file() and not (folder / name).exists():
            shutil.copyfile(base / name, folder / name)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    if not config.image_only and not (folder / "tokenizer").exists():
        shutil.copytree(base / "tokenizer", folder / "tokenizer")
    if not config.image_only and (known_words := read_known_words(folder / "tokenizer")) is not None:
        known_words.extended(captions).save(folder / "tokenizer")
    if not (folder / "stage1.safetensors").exists():
        shutil.copyfile(base / "stage1.safetensors", folder / "stage1.safetensors")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    about: dict[str, Any] = {"source": source}
    if caption_dropout is not None:
        about["caption_dropout"] = caption_dropout
    _replace(folder, "stage2.safetensors", {"stage1": stage1, "stage2": stage2}, about)


def write_vqgan(config: Config, folder: Path, params: Mapping[str, np.ndarray], source: str) -> None:
    """Writes a VQGAN alone into an existing folder. params: its parameters by path, float32."""
    shapes = leaf_shapes(config, "stage1")
    check_free_disk(folder, 4 * count_parameters(config, "stage1"), "the trained VQGAN")
    partial = folder / "stage1.safetensors.partial"
    partial.unlink(missing_ok=True)
    stage1 = write_weights(partial, shapes, ((path, params[path]) for path in shapes))
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    _replace(folder, "stage1.safetensors", {"stage1": stage1}, {"source": source})


def _replace(folder: Path, name: str, tensors: dict[str, Any], about: dict[str, Any]) -> None:
    """Renames the weights `name`.partial to `name`, and writes a manifest of these tensors with the entries `about`."""
    text = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "writer": f"mindalle-jax {mindalle_jax.__version__}",
            **about,
            "tensors": tensors,
        },
        indent=1,
    )
    (folder / f"{weights.MANIFEST}.partial").write_text(text, encoding="utf-8")
    (folder / weights.MANIFEST).unlink(missing_ok=True)
    os.replace(folder / f"{name}.partial", folder / name)
    os.replace(folder / f"{weights.MANIFEST}.partial", folder / weights.MANIFEST)
