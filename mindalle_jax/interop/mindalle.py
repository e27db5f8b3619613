"""Converts checkpoints of the PyTorch minDALL-E and of the VQGAN's authors into model folders, and back.

Both directions work tensor by tensor, by the tables of key_maps.py. PyTorch is not needed.
"""

import contextlib
import dataclasses
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
from mindalle_jax.errors import CheckpointError, ConfigError
from mindalle_jax.interop.key_maps import Slot, check_keys, slots, to_float32
from mindalle_jax.interop.torch_archive import TorchArchive, write_torch_archive
from mindalle_jax.storage import weights
from mindalle_jax.storage.card import write_license_and_card
from mindalle_jax.storage.files import check_apart, check_free_disk, new_folder
from mindalle_jax.storage.model_folder import (
    MODEL_MARKS,
    STAGE_FILES,
    ConversionReport,
    copy_tokenizer,
    in_dtype,
    open_model,
    verify_model,
    weights_progress,
)
from mindalle_jax.storage.weights import (
    FORMAT_VERSION,
    DiskDType,
    Stage,
    count_parameters,
    leaf_shapes,
    numpy_dtype,
    read_weights,
    write_weights,
)
from mindalle_jax.text.tokenizer import TextTokenizer


def import_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    config: str | Path | None = None,
    dtype: DiskDType = "float32",
    overwrite: bool = False,
) -> ConversionReport:
    """Converts PyTorch weights into a model folder, shows progress, and verifies the written files.

    source is one of
      - a folder in the original's format: config.yaml, tokenizer/, stage1_last.ckpt, stage2_last.ckpt.
      - a checkpoint of the original's transfer training, whose keys start with `stage1.` and `stage2.`. It is a .ckpt
        file, or a folder with config.yaml and only that file.
      - a .ckpt of the VQGAN's authors. It becomes a folder with stage 1 only. Its `loss.*` keys are ignored.
    config: the config.yaml, if it is not beside the weights. A VQGAN alone defaults to f16 with 16384 codes. dtype:
    number type of the written weights.

    Raises CheckpointError (also for values that dtype cannot hold), ConfigError, OutputError or UsageError. If it
    fails, no part of the target stays.
    """
    source, target = Path(os.path.expanduser(source)), Path(os.path.expanduser(target))
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
            if "stage2" in stages and not parsed.image_only:
                manifest["caption_dropout"] = 0.0  # the original's training has none
            start = time.perf_counter()
            with weights_progress(weight_bytes, "converting") as bar:
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
                copy_tokenizer(_tokenizer_folder(source), folder / "tokenizer")
            (folder / weights.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            write_license_and_card(source, folder, parsed, parameters, "stage2" in stages)
            verify_s = verify_model(folder, manifest, weight_bytes)
    tensors_written = sum(len(table) for table in wanted.values())
    return ConversionReport(target, tensors_written, parameters, weight_bytes, write_s, verify_s)


def export_checkpoint(source: str | Path, target: str | Path, *, overwrite: bool = False) -> ConversionReport:
    """Writes a model folder in the original's format, float32, for `torch.load`: the inverse of import_checkpoint.

    Raises CheckpointError, ConfigError or OutputError. If it fails, no part of the target stays.
    """
    source, target = Path(os.path.expanduser(source)), Path(os.path.expanduser(target))
    _, config, tensors = open_model(source)
    if config.stage1.hparams.num_groups != Stage1Hparams.num_groups:
        raise ConfigError(
            f"{source}: GroupNorm of {config.stage1.hparams.num_groups} groups; the original's has "
            f"{Stage1Hparams.num_groups}, and would make other images with these weights"
        )
    parameters = sum(count_parameters(config, stage) for stage in tensors)
    check_apart(source, target)
    check_free_disk(target, 4 * parameters + (64 << 20), "the exported checkpoint")
    tensors_written = 0
    with new_folder(target, overwrite, MODEL_MARKS) as folder:
        start = time.perf_counter()
        with weights_progress(4 * parameters, "exporting") as bar:
            for stage in tensors:
                table = slots(config, stage)
                tensors_written += len(table)
                arrays = _export_chunks(source / f"{stage}.safetensors", tensors[stage], table, bar)
                header = [(slot.torch_key, np.dtype(np.float32), slot.torch_shape) for slot in table]
                write_torch_archive(folder / STAGE_FILES[stage], header, _in_order(arrays))
        write_s = time.perf_counter() - start
        (folder / "config.yaml").write_text(_original_config(config), encoding="utf-8")
        if (source / "tokenizer").is_dir():
            copy_tokenizer(source / "tokenizer", folder / "tokenizer")
        if (source / "LICENSE").is_file():
            shutil.copyfile(source / "LICENSE", folder / "LICENSE")
        start = time.perf_counter()
        with weights_progress(4 * parameters, "verifying") as bar:
            for stage in tensors:
                with TorchArchive(folder / STAGE_FILES[stage]) as archive:
                    for ref in archive.state_dict().values():
                        bar.update(archive.read(ref).nbytes)  # reading checks the CRC-32 of each record
        verify_s = time.perf_counter() - start
    return ConversionReport(target, tensors_written, parameters, 4 * parameters, write_s, verify_s)


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors of one stage, and the file that holds them. The archive has them under their full keys."""

    file: str
    archive: TorchArchive
    refs: dict[str, tuple[str, Any]]
    """Key within the stage -> (full key, TensorRef)."""


def _open_stages(source: Path, stack: contextlib.ExitStack) -> dict[Stage, _Tensors]:
    """Opens the checkpoint files of a source; returns the tensors of each stage that they hold."""
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


def _original_config(config: Config) -> str:
    """Returns the text of a config.yaml that the original can load.

    It has only the sections that the original has for such a model. n_dense_layers is set, which the original needs,
    and the optimizer is the one that the original has.
    """
    hparams = dataclasses.replace(config.stage2.hparams, n_dense_layers=config.stage2.hparams.n_layers)
    optimizer = dataclasses.replace(config.optimizer, opt_type="adamW")
    config = dataclasses.replace(
        config, stage2=dataclasses.replace(config.stage2, hparams=hparams), optimizer=optimizer
    )
    sections = ("dataset", "stage1", "stage2") + (("optimizer", "experiment") if config.image_only else ())
    return dump_config(config, sections)


def _tokenizer_folder(source: Path) -> Path:
    return (source if source.is_dir() else source.parent) / "tokenizer"


def _import_chunks(tensors: _Tensors, table: list[Slot], dtype: str, bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Flax path, array in dtype) of each slot. The next tensor is read while this one is written."""
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
                array = in_dtype(array, dtype, f"{tensors.file}: {key}")
            bar.update(array.nbytes)
            yield slot.path, slot.from_torch(array)


def _export_chunks(
    path: Path, tensors: dict[str, Any], table: list[Slot], bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (PyTorch key, float32 array) of each slot, in the order of the table."""
    parts = itertools.groupby(table, key=lambda slot: (slot.path, slot.index[:1]))  # one group per part that is read
    for (name, _, array), ((leaf, _), group) in zip(read_weights(path, tensors), parts, strict=True):
        if leaf != name:
            raise AssertionError(f"{leaf} was due, {name} came")
        bar.update(4 * array.size)
        array = array.astype(np.float32, copy=False)
        for slot in group:
            yield slot.torch_key, slot.to_torch(array[slot.index[1:]])


def _in_order(arrays: Iterator[tuple[str, np.ndarray]]) -> Callable[[str], np.ndarray]:
    """Returns a function `read(key)` for callers that ask in exactly the order of the iterator."""

    def read(key: str) -> np.ndarray:
        name, array = next(arrays)
        if name != key:
            raise AssertionError(f"{key} was asked for, {name} came")
        return array

    return read
