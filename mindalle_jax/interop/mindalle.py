"""Checkpoints of the PyTorch minDALL-E and of the VQGAN authors -> model folders, and back; and from folder to folder.

Every direction streams tensor by tensor, those to and from PyTorch through the tables of key_maps.py; PyTorch is needed
by none.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import mindalle_jax
from mindalle_jax.config.file import dump_config, load_config
from mindalle_jax.config.schema import Config, Stage1Hparams
from mindalle_jax.errors import CheckpointError, ConfigError, DownloadError, OutputError, UsageError
from mindalle_jax.hub.download import RELEASES, cache_dir, fetch_release
from mindalle_jax.hub.huggingface import fetch_repo, is_repo_id
from mindalle_jax.interop.key_maps import Slot, check_keys, slots, to_float32
from mindalle_jax.interop.torch_archive import TorchArchive, write_torch_archive
from mindalle_jax.storage.files import DEMO, check_apart, check_free_disk, new_folder
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
from mindalle_jax.text.tokenizer import MERGES_FILE, VOCAB_FILE, TextTokenizer
from mindalle_jax.training.lora import Adapters, merged

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


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    config: str | Path | None = None,
    dtype: DiskDType = "float32",
    overwrite: bool = False,
) -> Report:
    """Converts PyTorch weights into a model folder, shows progress, verifies what was written.

    source is one of
      - a folder in the original's format: config.yaml, tokenizer/, stage1_last.ckpt, stage2_last.ckpt;
      - a checkpoint of the original's transfer training, whose keys start with `stage1.` and `stage2.`: a .ckpt file,
        or a folder holding config.yaml and just that file;
      - a VQGAN .ckpt of its authors: becomes a folder with stage 1 only (its `loss.*` keys are ignored).
    config: the config.yaml, where it does not lie beside the weights; a VQGAN alone defaults to f16 with 16384 codes.

    Raises CheckpointError (also for values that dtype cannot hold), ConfigError, OutputError or UsageError; nothing
    half-written is left behind.
    """
    source, target = Path(source), Path(target)
    with contextlib.ExitStack() as stack:
        stages = _open_stages(source, stack)
        parsed = _read_config(source, config, stages)
        if "stage2" in stages and not parsed.image_only:
            folder = _tokenizer_folder(source)
            TextTokenizer(folder, parsed.dataset.context_length, parsed.stage2.vocab_size_txt)
        wanted: dict[Stage, list[Slot]] = {}
        for stage, tensors in stages.items():
            wanted[stage] = slots(parsed, stage)
            check_keys({key: ref.shape for key, (_, ref) in tensors.refs.items()}, wanted[stage], tensors.file, stage)
        parameters = sum(count_parameters(parsed, stage) for stage in stages)
        weight_bytes = numpy_dtype(dtype).itemsize * parameters
        check_apart(source, target)
        check_free_disk(target, weight_bytes + (64 << 20), "the converted model")
        with new_folder(target, overwrite, MODEL_MARKS) as folder:
            manifest = {
                "format_version": FORMAT_VERSION,
                "writer": f"mindalle-jax {mindalle_jax.__version__}",
                "source": {Path(t.file).name: Path(t.file).stat().st_size for t in stages.values()},
                "tensors": {},
            }
            start = time.perf_counter()
            with _progress(weight_bytes, "converting") as bar:
                for stage, tensors in stages.items():
                    manifest["tensors"][stage] = write_weights(
                        folder / f"{stage}.safetensors",
                        leaf_shapes(parsed, stage),
                        _import_chunks(tensors, wanted[stage], dtype, bar),
                        dtype,
                    )
            write_s = time.perf_counter() - start
            (folder / "config.yaml").write_text(dump_config(parsed), encoding="utf-8")
            if "stage2" in stages and not parsed.image_only:
                _copy_tokenizer(_tokenizer_folder(source), folder / "tokenizer")
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _write_license_and_card(source, folder, parsed, parameters, "stage2" in stages)
            verify_s = _verify(folder, manifest, weight_bytes)
    tensors_written = sum(len(table) for table in wanted.values())
    return Report(target, tensors_written, parameters, weight_bytes, write_s, verify_s)


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


def export_checkpoint(source: str | Path, target: str | Path, *, overwrite: bool = False) -> Report:
    """Writes a model folder in the original's format, float32, for `torch.load`; the inverse of import_checkpoint.

    Raises CheckpointError, ConfigError or OutputError; nothing half-written is left behind.
    """
    source, target = Path(source), Path(target)
    _, config, tensors = _open_model(source)
    if config.stage1.hparams.num_groups != Stage1Hparams.num_groups:
        raise ConfigError(
            f"{source}: GroupNorm of {config.stage1.hparams.num_groups} groups; the original's has "
            f"{Stage1Hparams.num_groups}, and would draw other pictures with these weights"
        )
    parameters = sum(count_parameters(config, stage) for stage in tensors)
    check_apart(source, target)
    check_free_disk(target, 4 * parameters + (64 << 20), "the exported checkpoint")
    tensors_written = 0
    with new_folder(target, overwrite, MODEL_MARKS) as folder:
        start = time.perf_counter()
        with _progress(4 * parameters, "exporting") as bar:
            for stage in tensors:
                table = slots(config, stage)
                tensors_written += len(table)
                arrays = _export_chunks(source / f"{stage}.safetensors", tensors[stage], table, bar)
                header = [(slot.torch_key, np.dtype(np.float32), slot.torch_shape) for slot in table]
                write_torch_archive(folder / STAGE_FILES[stage], header, _in_order(arrays))
        write_s = time.perf_counter() - start
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        if (source / "tokenizer").is_dir():
            _copy_tokenizer(source / "tokenizer", folder / "tokenizer")
        if (source / "LICENSE").is_file():
            shutil.copyfile(source / "LICENSE", folder / "LICENSE")
        start = time.perf_counter()
        with _progress(4 * parameters, "verifying") as bar:
            for stage in tensors:
                with TorchArchive(folder / STAGE_FILES[stage]) as archive:
                    for ref in archive.state_dict().values():
                        bar.update(archive.read(ref).nbytes)  # reading checks the CRC-32 of each record
        verify_s = time.perf_counter() - start
    return Report(target, tensors_written, parameters, 4 * parameters, write_s, verify_s)


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


def find_model(
    path_or_name: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The converted folder of a path, else of a known name, else of a repository of the Hugging Face hub.

    Downloads, unless local_files_only, and converts, into the caches, as needed. revision: of the repository.
    Raises UsageError for the revision of something else; otherwise see Dalle.from_pretrained.
    """
    path, name = Path(path_or_name).expanduser(), str(path_or_name)
    if revision is not None and (path.exists() or name in (DEMO.name, *RELEASES)):
        raise UsageError(f"{name} is {'a path' if path.exists() else 'a known name'} and has no revision {revision!r}")
    if not path.exists():
        if name == DEMO.name:
            return DEMO
        if name in RELEASES:
            if local_files_only and not (cache_dir() / name).exists():
                raise DownloadError(
                    f"{name} is not in the cache {cache_dir()}, and nothing may be downloaded (local_files_only)"
                )
            path = fetch_release(name)
        elif is_repo_id(name):
            path = fetch_repo(name, MODEL_FILES, revision=revision, local_files_only=local_files_only)
        else:
            raise CheckpointError(
                f"{name}: no such folder, and no known name ({', '.join([DEMO.name, *RELEASES])}) or OWNER/NAME of the "
                "hub"
            )
    if (path / MANIFEST).is_file():
        return path
    # A file may be a link, as in the cache of the hub: it is its own name that lies beside config.yaml.
    source = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    folder = source if source.is_dir() else source.parent
    files = [*(source.glob("*.*") if source.is_dir() else [source, *folder.glob("config.yaml")])]
    files += folder.glob("tokenizer/*")
    stamps = sorted(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    key = hashlib.sha256("\n".join([str(source), *stamps]).encode()).hexdigest()[:16]
    target = cache_dir() / "converted" / f"{source.name}-{key}"
    if not target.exists():
        try:
            import_checkpoint(source, target)
        except OutputError:
            if not (target / MANIFEST).is_file():  # it is there if another process was quicker
                raise
    return target


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors of one stage and the file that they lie in; the archive knows them under their full key."""

    file: str
    archive: TorchArchive
    refs: dict[str, tuple[str, Any]]
    """Key within the stage -> (full key, TensorRef)."""


def _open_stages(source: Path, stack: contextlib.ExitStack) -> dict[Stage, _Tensors]:
    """Opens the checkpoint files of a source and tells which stages they hold."""
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    if source.is_dir():
        files = {stage: source / name for stage, name in STAGE_FILES.items()}
        if any(file.exists() for file in files.values()):
            if missing := [file.name for file in files.values() if not file.is_file()]:
                raise CheckpointError(f"{source}: {' and '.join(missing)} missing; the folder needs both stages")
            opened = {stage: stack.enter_context(TorchArchive(file)) for stage, file in files.items()}
            return {stage: _whole_file(opened[stage], files[stage]) for stage in STAGE_FILES}
        candidates = sorted(source.glob("*.ckpt"))
        if len(candidates) != 1:
            raise CheckpointError(
                f"{source}: not a checkpoint folder of the original: it needs {' and '.join(STAGE_FILES.values())}, "
                f"or one .ckpt file of both stages ({len(candidates)} .ckpt files found)"
            )
        source = candidates[0]
    archive = stack.enter_context(TorchArchive(source))
    keys = archive.state_dict()
    if any(key.startswith("stage1.") for key in keys) and any(key.startswith("stage2.") for key in keys):
        result: dict[Stage, _Tensors] = {}
        for stage in STAGE_FILES:
            prefix = f"{stage}."
            refs = {key.removeprefix(prefix): (key, ref) for key, ref in keys.items() if key.startswith(prefix)}
            result[stage] = _Tensors(str(source), archive, refs)
        if odd := [key for key in keys if not key.startswith(("stage1.", "stage2."))]:
            raise CheckpointError(f"{source}: keys that belong to neither stage: {', '.join(odd[:10])}")
        return result
    if "quantize.embedding.weight" in keys:
        refs = {key: (key, ref) for key, ref in keys.items() if not key.startswith("loss.")}
        return {"stage1": _Tensors(str(source), archive, refs)}
    raise CheckpointError(
        f"{source}: neither a VQGAN nor a checkpoint of both stages (keys: {', '.join(list(keys)[:3]) or 'none'}); "
        f"a transformer alone is converted from a folder with {' and '.join(STAGE_FILES.values())}"
    )


def _whole_file(archive: TorchArchive, file: Path) -> _Tensors:
    return _Tensors(str(file), archive, {key: (key, ref) for key, ref in archive.state_dict().items()})


def _read_config(source: Path, config: str | Path | None, stages: dict[Stage, _Tensors]) -> Config:
    folder = source if source.is_dir() else source.parent
    if config is None and (folder / "config.yaml").is_file():
        config = folder / "config.yaml"
    if config is None and "stage2" not in stages:
        return Config()
    if config is None:
        raise ConfigError(f"{folder / 'config.yaml'}: missing; put it beside the weights or name it with --config")
    return load_config(config)


def _tokenizer_folder(source: Path) -> Path:
    return (source if source.is_dir() else source.parent) / "tokenizer"


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, target / name)


def _import_chunks(tensors: _Tensors, table: list[Slot], dtype: str, bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
    """(Flax path, array in dtype) of each slot. The next tensor is read while the last is written."""
    with ThreadPoolExecutor(1) as reader:

        def start(slot: Slot) -> Any:
            return reader.submit(tensors.archive.read, tensors.refs[slot.torch_key][1])

        coming = start(table[0])
        for i, slot in enumerate(table):
            array = coming.result()
            if i + 1 < len(table):
                coming = start(table[i + 1])
            key = tensors.refs[slot.torch_key][0]
            array = to_float32(array, tensors.file, key)
            if dtype != "float32":
                array = _in_dtype(array, dtype, f"{tensors.file}: {key}")
            bar.update(array.nbytes)
            yield slot.path, slot.from_torch(array)


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


def _export_chunks(
    path: Path, tensors: dict[str, Any], table: list[Slot], bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    """(PyTorch key, float32 array) of each slot, in the order of the table."""
    parts = itertools.groupby(table, key=lambda slot: (slot.path, slot.index[:1]))  # one group a part that is read
    for (name, _, array), ((leaf, _), group) in zip(read_weights(path, tensors), parts, strict=True):
        if leaf != name:
            raise AssertionError(f"{leaf} was due, {name} came")
        bar.update(4 * array.size)
        array = array.astype(np.float32, copy=False)
        for slot in group:
            yield slot.torch_key, slot.to_torch(array[slot.index[1:]])


def _in_order(arrays: Iterator[tuple[str, np.ndarray]]) -> Callable[[str], np.ndarray]:
    """A `read(key)` for callers that ask in the very order of the iterator."""

    def read(key: str) -> np.ndarray:
        name, array = next(arrays)
        if name != key:
            raise AssertionError(f"{key} was asked for, {name} came")
        return array

    return read


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
