"""Model folders: copied, verified, written from a run, with their licence and card."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import mindalle_jax
from mindalle_jax.config.file import dump_config, load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import CheckpointError
from mindalle_jax.storage.adapters import Adapters, merged
from mindalle_jax.storage.files import check_apart, check_free_disk, new_folder
from mindalle_jax.storage.weights import (
    FORMAT_VERSION,
    MANIFEST,
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
from mindalle_jax.text.tokenizer import MERGES_FILE, VOCAB_FILE

TOKENIZER_FILES = (VOCAB_FILE, MERGES_FILE)


STAGE_FILES: dict[Stage, str] = {"stage1": "stage1_last.ckpt", "stage2": "stage2_last.ckpt"}


MODEL_MARKS = (MANIFEST, STAGE_FILES["stage1"])
"""A folder that holds one of these is a model, and may be replaced by another."""


MODEL_FILES = (
    *("config.yaml", MANIFEST, "LICENSE", "README.md", "*.ckpt"),
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    *(f"{stage}.safetensors" for stage in STAGE_FILES),
)
"""What is read of a repository of the hub, in either format."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did."""

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
) -> Report:
    """Writes a model folder again, shows progress, verifies what was written.

    dtype: of the weights in the copy; None is that of the source. Half as many bytes are half the disk and download.
    adapters: are added to the weights of the transformer, whose dtype is then float32 by default, as after a run.

    Raises CheckpointError (also for values that dtype cannot hold), ConfigError, OutputError or UsageError; nothing
    half-written is left behind.
    """
    source, target = Path(source), Path(target)
    manifest, config, tensors = _open_model(source)
    if adapters and "stage2" not in tensors:
        raise CheckpointError(f"{source}: a VQGAN alone has no weights that adapters go with")
    dtypes = {stage: _one_dtype(entries) if dtype is None else dtype for stage, entries in tensors.items()}
    if adapters and dtype is None:
        dtypes["stage2"] = "float32"
    parameters = {stage: count_parameters(config, stage) for stage in tensors}
    weight_bytes = sum(numpy_dtype(dtypes[stage]).itemsize * parameters[stage] for stage in tensors)
    check_apart(source, target)
    check_free_disk(target, weight_bytes + (64 << 20), "the copy of the model")
    with new_folder(target, overwrite, MODEL_MARKS) as folder:
        start = time.perf_counter()
        with _progress(weight_bytes, "copying") as bar:
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
            _copy_tokenizer(source / "tokenizer", folder / "tokenizer")
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        verify_s = _verify(folder, manifest, weight_bytes)
    tensors_written = sum(len(entries) for entries in tensors.values())
    return Report(target, tensors_written, sum(parameters.values()), weight_bytes, write_s, verify_s)


def _open_model(source: Path) -> tuple[dict[str, Any], Config, dict[Stage, dict[str, Any]]]:
    """The manifest and configuration of a model folder, and the tensors of each stage that it has, in order."""
    manifest = read_manifest(source)
    config = load_config(source / "config.yaml")
    tensors: dict[Stage, dict[str, Any]] = {}
    for stage in STAGE_FILES:
        if stage in manifest["tensors"]:
            tensors[stage] = check_tensors(source, stage, manifest["tensors"][stage], leaf_shapes(config, stage))
    return manifest, config, tensors


def _one_dtype(tensors: dict[str, Any]) -> str:
    """The dtype of all tensors of a file, float32 where they differ: it holds every value of the others."""
    dtypes = {entry["dtype"] for entry in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _verify(folder: Path, manifest: dict[str, Any], weight_bytes: int) -> float:
    """Reads the weights of a folder, which checks each tensor; returns the seconds taken."""
    start = time.perf_counter()
    with _progress(weight_bytes, "verifying") as bar:
        for stage, tensors in manifest["tensors"].items():
            for _, _, array in read_weights(folder / f"{stage}.safetensors", tensors):
                bar.update(array.nbytes)
    return time.perf_counter() - start


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, target / name)


def _copy_chunks(
    path: Path, tensors: dict[str, Any], dtype: str, adapters: Adapters | None, bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    """(Flax path, array in dtype) of each part of a weights file, its adapter added."""
    for name, layer, array in read_weights(path, tensors):
        before = array
        if adapters:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
                array = merged(name, array, adapters.leaves, adapters.scale, layer)
        if array is not before or array.dtype != numpy_dtype(dtype):  # else bit for bit
            array = _in_dtype(array, dtype, f"{path}: {name}")
        bar.update(array.nbytes)
        yield name, array


def _in_dtype(array: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """`array` in dtype, by way of float32. Raises CheckpointError if that is not finite."""
    with np.errstate(over="ignore"):  # what is beyond a dtype becomes inf, which is refused below
        array = array.astype(np.float32, copy=False)
        # min and max carry NaN, and need no temporary array; those of 16 bits take ten times as long.
        extremes = np.array([array.min(), array.max()] if array.size else []).astype(numpy_dtype(dtype))
        array = array.astype(numpy_dtype(dtype), copy=False)
    if not np.isfinite(extremes).all():
        hint = "; bfloat16 has the range of float32" if dtype == "float16" else ""
        raise CheckpointError(f"{what} holds NaN or infinite values (in {dtype}){hint}")
    return array


def _progress(total_bytes: int, what: str) -> tqdm:
    return tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5)


CODE_LICENSE_NOTE = """\
Licence of the weights in this folder

They were converted from "{source}" and keep the licence of that source.

The published minDALL-E/1.3B weights (Kakao Brain, 2021), and any weights fine-tuned from them, are under
CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): credit Kakao Brain, no commercial use, share
derivatives alike. The VQGAN of stage 1 goes back to the f16-16384 model of Esser, Rombach and Ommer (2021).

The mindalle-jax code is under Apache-2.0; that does not extend to these weights.
"""


CARD = """\
---
library_name: mindalle-jax
pipeline_tag: {task}
license: other
license_name: see-license-file
license_link: LICENSE
---

# {title}

Converted from `{source}` by mindalle-jax {version}: {parameters:,} parameters.
{example}
- Pictures: {resolution} x {resolution} pixels only, {codes} codes out of {n_embed}.
- {use}
- Limits: trained on captions from the web; it reproduces their biases and errors, cannot spell, and counts badly.
- Licence of the weights: see LICENSE.
"""


EXAMPLE = """
    from mindalle_jax import {cls}
    model = {cls}.from_pretrained("PATH-OF-THIS-FOLDER")
"""


def _write_license_and_card(source: Path, folder: Path, config: Config, parameters: int, draws: bool) -> None:
    """The licence of the source if it has one, else what is known of it; and a model card."""
    own = (source if source.is_dir() else source.parent) / "LICENSE"
    if own.is_file():
        shutil.copyfile(own, folder / "LICENSE")
    else:
        (folder / "LICENSE").write_text(CODE_LICENSE_NOTE.format(source=source.name), encoding="utf-8")
    if not draws:
        task, cls, use = "image-to-image", None, "A VQGAN alone: pictures to codes and back. Nothing in here draws."
    elif config.image_only:
        task, cls = "unconditional-image-generation", "ImageGPT"
        use = "Pictures without text, by class or freely."
    else:
        task, cls, use = "text-to-image", "Dalle", "Text to image, English prompts."
    card = CARD.format(
        task=task,
        title=source.name if source.is_dir() else source.stem,
        source=source.name,
        version=mindalle_jax.__version__,
        parameters=parameters,
        example=EXAMPLE.format(cls=cls) if cls else "",
        resolution=config.stage1.hparams.resolution,
        codes=config.stage1.code_size**2,
        n_embed=config.stage1.n_embed,
        use=use,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_model(
    base: Path, config: Config, folder: Path, leaf: Callable[[str, tuple[int, ...]], np.ndarray], source: str
) -> None:
    """Writes a model into an existing folder: stage 2 from leaf(path, shape), what is not there as in the model `base`.

    The manifest is replaced last, so a folder with an old model in it holds one of the two.
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
    for name in ("LICENSE", "README.md"):
        if (base / name).is_file() and not (folder / name).exists():
            shutil.copyfile(base / name, folder / name)
    if not config.image_only and not (folder / "tokenizer").exists():
        shutil.copytree(base / "tokenizer", folder / "tokenizer")
    if not (folder / "stage1.safetensors").exists():
        shutil.copyfile(base / "stage1.safetensors", folder / "stage1.safetensors")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    _replace(folder, "stage2.safetensors", {"stage1": stage1, "stage2": stage2}, source)


def write_vqgan(config: Config, folder: Path, params: Mapping[str, np.ndarray], source: str) -> None:
    """Writes a VQGAN alone into an existing folder. params: its parameters by path, float32."""
    shapes = leaf_shapes(config, "stage1")
    check_free_disk(folder, 4 * count_parameters(config, "stage1"), "the trained VQGAN")
    partial = folder / "stage1.safetensors.partial"
    partial.unlink(missing_ok=True)
    stage1 = write_weights(partial, shapes, ((path, params[path]) for path in shapes))
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    _replace(folder, "stage1.safetensors", {"stage1": stage1}, source)


def _replace(folder: Path, weights: str, tensors: dict[str, Any], source: str) -> None:
    """Puts the weights `NAME.partial` in their place, and a manifest of these tensors."""
    text = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "writer": f"mindalle-jax {mindalle_jax.__version__}",
            "source": source,
            "tensors": tensors,
        },
        indent=1,
    )
    (folder / f"{MANIFEST}.partial").write_text(text, encoding="utf-8")
    os.replace(folder / f"{weights}.partial", folder / weights)
    os.replace(folder / f"{MANIFEST}.partial", folder / MANIFEST)
