"""The files of a model folder. Reads and verifies a folder, and copies it with another dtype or with adapters added."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import CheckpointError
from mindalle_jax.storage import weights
from mindalle_jax.storage.adapters import Adapters, merged
from mindalle_jax.storage.files import RANKER, check_apart, check_free_disk, new_folder
from mindalle_jax.storage.weights import (
    DiskDType,
    Stage,
    check_tensors,
    count_parameters,
    leaf_shapes,
    numpy_dtype,
    read_manifest,
    read_weights,
    write_weights,
)
from mindalle_jax.text.known_words import WORDS_FILE
from mindalle_jax.text.tokenizer import MERGES_FILE, VOCAB_FILE

TOKENIZER_FILES = (VOCAB_FILE, MERGES_FILE)
STAGE_FILES: dict[Stage, str] = {"stage1": "stage1_last.ckpt", "stage2": "stage2_last.ckpt"}
"""Names of the weights in a folder in the original's format. In our format they are STAGE.safetensors."""

MODEL_MARKS = (weights.MANIFEST, STAGE_FILES["stage1"])
"""A folder that holds one of these files is a model, so another model may replace it."""
RANKER_FILES = (
    *("config.json", "preprocessor_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
)
"""Names of the files of a CLIP model in the folder `ranker`."""
MODEL_FILES = (
    *("config.yaml", weights.MANIFEST, "LICENSE", "README.md", "*.ckpt"),
    *(f"tokenizer/{name}" for name in (*TOKENIZER_FILES, WORDS_FILE)),
    *(f"{stage}.safetensors" for stage in STAGE_FILES),
    *(f"{RANKER}/{name}" for name in RANKER_FILES),
)
"""Patterns of the files that are fetched from a repository of the hub, in either format."""


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Result of a conversion: sizes and times."""

    target: Path
    tensors: int
    parameters: int
    weight_bytes: int
    write_s: float
    verify_s: float

    def __str__(self) -> str:
        rate = self.weight_bytes / 1e9 / self.write_s
        return (
            f"{self.target}: {self.tensors} tensors, {self.parameters:,} parameters, {self.weight_bytes / 1e9:.2f} GB; "
            f"written in {self.write_s:.1f} s ({rate:.2f} GB/s), verified in {self.verify_s:.1f} s"
        )


def copy_model(
    source: str | Path,
    target: str | Path,
    *,
    dtype: DiskDType | None = None,
    adapters: Adapters | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Copies a model folder, shows progress, and verifies the copy.

    dtype: number type of the weights in the copy; None keeps that of the source. 16-bit weights take half the disk and
    download. adapters: are added to the weights of the transformer; their dtype is then float32 by default, as after a
    run.

    Raises CheckpointError (also for values that dtype cannot hold), ConfigError, OutputError or UsageError. If it
    fails, no part of the target stays.
    """
    source, target = Path(os.path.expanduser(source)), Path(os.path.expanduser(target))
    manifest, config, tensors = open_model(source)
    if adapters and "stage2" not in tensors:
        raise CheckpointError(f"{source}: a VQGAN alone has no transformer, to which adapters belong")
    dtypes = {stage: _one_dtype(entries) if dtype is None else dtype for stage, entries in tensors.items()}
    if adapters and dtype is None:
        dtypes["stage2"] = "float32"
    parameters = {stage: count_parameters(config, stage) for stage in tensors}
    weight_bytes = sum(numpy_dtype(dtypes[stage]).itemsize * parameters[stage] for stage in tensors)
    check_apart(source, target)
    check_free_disk(target, weight_bytes + (64 << 20), "the copy of the model")
    with new_folder(target, overwrite, MODEL_MARKS) as folder:
        start = time.perf_counter()
        with weights_progress(weight_bytes, "copying") as bar:
            for stage, entries in tensors.items():
                name = f"{stage}.safetensors"
                added = adapters if stage == "stage2" else None
                chunks = _copy_chunks(source / name, entries, dtypes[stage], added, bar)
                shapes = leaf_shapes(config, stage)
                manifest["tensors"][stage] = write_weights(folder / name, shapes, chunks, dtypes[stage])
        write_s = time.perf_counter() - start
        for name in ("config.yaml", "LICENSE", "README.md"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / "tokenizer").is_dir():
            copy_tokenizer(source / "tokenizer", folder / "tokenizer")
        for name in RANKER_FILES:
            if (source / RANKER / name).is_file():
                (folder / RANKER).mkdir(exist_ok=True)
                shutil.copyfile(source / RANKER / name, folder / RANKER / name)
        (folder / weights.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        verify_s = verify_model(folder, manifest, weight_bytes)
    tensors_written = sum(len(entries) for entries in tensors.values())
    return ConversionReport(target, tensors_written, sum(parameters.values()), weight_bytes, write_s, verify_s)


def _one_dtype(tensors: dict[str, Any]) -> str:
    """Returns the dtype of all tensors of a file. If they differ it is float32, which holds every value of the rest."""
    dtypes = {entry["dtype"] for entry in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _copy_chunks(
    path: Path, tensors: dict[str, Any], dtype: str, adapters: Adapters | None, bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Flax path, array in dtype) of each part of a weights file, with its adapter added."""
    for name, layer, array in read_weights(path, tensors):
        before = array
        if adapters:
            with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are refused below
                array = merged(name, array, adapters.leaves, adapters.scale, layer)
        if array is not before or array.dtype != numpy_dtype(dtype):  # else it is copied bit for bit
            array = in_dtype(array, dtype, f"{path}: {name}")
        bar.update(array.nbytes)
        yield name, array


# Parts that interop/mindalle.py uses too


def open_model(source: Path) -> tuple[dict[str, Any], Config, dict[Stage, dict[str, Any]]]:
    """Reads a model folder; returns its manifest, its configuration, and the manifest's tensors by stage, in order.

    Raises CheckpointError or ConfigError.
    """
    manifest = read_manifest(source)
    config = load_config(source / "config.yaml")
    tensors: dict[Stage, dict[str, Any]] = {}
    for stage in STAGE_FILES:
        if stage in manifest["tensors"]:
            tensors[stage] = check_tensors(source, stage, manifest["tensors"][stage], leaf_shapes(config, stage))
    return manifest, config, tensors


def verify_model(folder: Path, manifest: dict[str, Any], weight_bytes: int) -> float:
    """Reads the weights of a folder and checks each tensor. Returns the seconds taken. Raises CheckpointError."""
    start = time.perf_counter()
    with weights_progress(weight_bytes, "verifying") as bar:
        for stage, tensors in manifest["tensors"].items():
            for _, _, array in read_weights(folder / f"{stage}.safetensors", tensors):
                bar.update(array.nbytes)
    return time.perf_counter() - start


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer, and its list of words if there is one, to the new folder `target`."""
    target.mkdir()
    for name in (*TOKENIZER_FILES, WORDS_FILE):
        if name in TOKENIZER_FILES or (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def in_dtype(array: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Converts an array to float32 and then to dtype. Raises CheckpointError, naming `what`, for NaN and infinity."""
    with np.errstate(over="ignore"):  # a value beyond the range of dtype becomes inf, which is refused below
        array = array.astype(np.float32, copy=False)
        # min and max pass NaN on, and need no temporary array. On arrays of 16 bits they take ten times as long.
        extremes = np.array([array.min(), array.max()] if array.size else []).astype(numpy_dtype(dtype))
        array = array.astype(numpy_dtype(dtype), copy=False)
    if not np.isfinite(extremes).all():
        hint = "; bfloat16 has the range of float32" if dtype == "float16" else ""
        raise CheckpointError(f"{what} holds NaN or infinite values (in {dtype}){hint}")
    return array


def weights_progress(total_bytes: int, what: str) -> tqdm:
    """Returns a progress bar in bytes, with the title `what`."""
    return tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5)
