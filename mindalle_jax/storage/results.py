"""Writes the weights that a run has trained into its folder, and copies the rest from the base model."""

import contextlib
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

RESULT = ".result"
"""Name of the folder inside the folder of a run in which a result is written, until it is complete."""


def write_model(
    base: Path,
    config: Config,
    folder: Path,
    leaf: Callable[[str, tuple[int, ...]], np.ndarray],
    source: str,
    *,
    about: Mapping[str, object] | None = None,
    tokenizer: Path | None = None,
    captions: Iterable[str] = (),
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model into an existing folder: stage 2 from leaf(path, shape), and other files from the model `base`.

    leaf: returns a float32 array by path and shape. source: the manifest's text about where the weights come from.
    about: more entries of the manifest (see read_manifest); None is left out. tokenizer: its folder; None takes that of
    the base. captions: captions of the training; their words are added to the tokenizer's list of words, if it has one.
    files: name -> content of further files, or of README.md, which else is that of the base.

    A model that the folder holds is replaced when the new one is complete. After a kill the folder holds the old model
    or the new one, or, if it came in the moment of the renames, none. Raises OutputError if the disk is too small, and
    CheckpointError for a damaged base.
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

    with _result_folder(folder) as result:
        stage2 = write_weights(result / "stage2.safetensors", shapes, chunks())
        shutil.copyfile(base / "stage1.safetensors", result / "stage1.safetensors")
        for name in ("LICENSE", "README.md"):
            if (base / name).is_file():
                shutil.copyfile(base / name, result / name)
        for name, content in (files or {}).items():
            (result / name).write_bytes(content)
        if not config.image_only:
            shutil.copytree(tokenizer or base / "tokenizer", result / "tokenizer")
            if (known_words := read_known_words(result / "tokenizer")) is not None:
                known_words.extended(captions).save(result / "tokenizer")
        (result / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        _write_manifest(result, {"stage1": stage1, "stage2": stage2}, {"source": source, **(about or {})})


def write_vqgan(config: Config, folder: Path, params: Mapping[str, np.ndarray], source: str) -> None:
    """Writes a VQGAN alone into an existing folder. params: its parameters by path, float32."""
    shapes = leaf_shapes(config, "stage1")
    check_free_disk(folder, 4 * count_parameters(config, "stage1"), "the trained VQGAN")
    with _result_folder(folder) as result:
        stage1 = write_weights(result / "stage1.safetensors", shapes, ((path, params[path]) for path in shapes))
        (result / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        _write_manifest(result, {"stage1": stage1}, {"source": source})


@contextlib.contextmanager
def _result_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder inside `folder`. If the block succeeds, its files move to `folder`, the manifest last.

    A folder with a manifest is a model. So the old manifest is removed first, and the rename of the new one is what
    makes the new files a model.
    """
    result = folder / RESULT
    shutil.rmtree(result, ignore_errors=True)  # left by a process that was killed
    result.mkdir()
    with contextlib.ExitStack() as failed:
        failed.callback(shutil.rmtree, result, ignore_errors=True)
        yield result
        failed.pop_all()
    (folder / weights.MANIFEST).unlink(missing_ok=True)
    for path in sorted(result.iterdir(), key=lambda path: path.name == weights.MANIFEST):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    result.rmdir()


def _write_manifest(folder: Path, tensors: dict[str, Any], about: Mapping[str, object]) -> None:
    entries = {name: value for name, value in about.items() if value is not None}
    manifest = {"format_version": FORMAT_VERSION, "writer": f"mindalle-jax {mindalle_jax.__version__}", **entries}
    text = json.dumps(manifest | {"tensors": tensors}, indent=1)
    (folder / weights.MANIFEST).write_text(text, encoding="utf-8")
