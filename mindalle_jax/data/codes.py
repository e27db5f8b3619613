"""Data sets of codes that are computed beforehand, so that the VQGAN need not run in every step of training.

A folder holds

    codes.json                    describes the codes: their VQGAN, their data, their number
    00000.npy, 00000.json, ...    a shard: codes uint16 or int32 [n, T]; its CRC-32, and id, captions, label per sample

The .json of a shard is written last, so a shard is complete if its .json exists.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from tqdm import tqdm

from mindalle_jax.config.file import load_config
from mindalle_jax.data.loader import Loader
from mindalle_jax.data.samples import Sample, Source
from mindalle_jax.errors import DataError, OutputError, UsageError, one_line
from mindalle_jax.storage.files import check_free_disk, check_output, check_writable, disk_errors, to_disk
from mindalle_jax.storage.weights import read_manifest

MANIFEST = "codes.json"
FORMAT_VERSION = 1
SHARD_SAMPLES = 4_096
"""Number of samples per shard, before damaged images are left out. An interruption loses at most one shard."""


@dataclass(frozen=True)
class Manifest:
    """The content of codes.json."""

    format_version: int
    vqgan: str
    """vqgan_digest of the model."""
    data: str
    """Fingerprint of the source of the images."""
    image_size: int
    codes: int
    """T: number of codes per image."""
    dtype: str
    samples: int
    """Number of samples in the source, with damaged images."""
    shard_samples: int
    classes: list[str] | None


def vqgan_digest(model: Path) -> str:
    """Returns a hexadecimal digest of the VQGAN of a model folder, from the CRC-32s of its weights and its config."""
    parts = [read_manifest(model)["tensors"]["stage1"], asdict(load_config(model / "config.yaml").stage1)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Codec(Protocol):
    """The encoder of a VQGAN. ImageCodec in sampling/codec.py is one."""

    size: int
    """Height and width of the images, in pixels."""
    side: int
    """Height and width of the codes of an image."""
    vocab_size: int

    def encode(self, images: Any, *, batch_size: int) -> np.ndarray:
        """Returns codes int32[n, side, side] of images uint8[n, size, size, 3]."""
        ...


def write_codes(
    source: Source, codec: Codec, out: Path, *, vqgan: str, batch_size: int, threads: int | None = None
) -> None:
    """Writes the codes of every image of a source into the folder `out`, or resumes an earlier call there.

    Images are cropped in the middle, so training on codes has no random crops. Damaged images are left out.
    vqgan: vqgan_digest of the model. batch_size, threads: as for Loader.

    Raises OutputError if `out` holds anything but shards of the same codes, or cannot be written to. Raises DataError
    if too many images are damaged.
    """
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        vqgan=vqgan,
        data=source.fingerprint(),
        image_size=codec.size,
        codes=codec.side**2,
        dtype="uint16" if codec.vocab_size <= 1 << 16 else "int32",
        samples=len(source),
        shard_samples=SHARD_SAMPLES,
        classes=source.classes,
    )
    _start(out, manifest)
    with tqdm(total=len(source), desc=out.name, unit="image", disable=None) as bar:
        for shard, first in enumerate(range(0, len(source), SHARD_SAMPLES)):
            part = source.part(first, first + SHARD_SAMPLES)
            if (out / f"{shard:05}.json").exists():
                bar.update(len(part))
            else:
                codes: list[np.ndarray] = []
                samples: list[Sample] = []
                for batch in Loader(part, batch_size=batch_size, train=False, image_size=codec.size, threads=threads):
                    valid = batch["valid"]
                    encoded = codec.encode(batch["image"], batch_size=batch_size)
                    codes.append(encoded[valid].reshape(-1, codec.side**2).astype(manifest.dtype))
                    samples += [part[number] for number in batch["sample"][valid]]
                    bar.update(int((batch["index"] < len(part)).sum()))
                _write_shard(out, shard, np.concatenate(codes), samples)


def code_samples(folder: Path, vqgan: str | None) -> tuple[Iterator[Sample], list[str] | None]:
    """Reads a folder that write_codes wrote; returns its samples, and the names of the classes or None.

    The codes of the samples are views of memory-mapped files. vqgan: vqgan_digest of the model to train. Raises
    DataError if the codes are those of another VQGAN, are incomplete, or are damaged. Raises UsageError if vqgan is
    None.
    """
    manifest = _read_manifest(folder)
    if vqgan is None:
        raise UsageError(f"{folder} holds codes, which only mindalle finetune reads; name a data set of images")
    if vqgan != manifest.vqgan:
        raise DataError(
            f"{folder}: codes of another VQGAN ({manifest.vqgan[:8]}) than that of the model ({vqgan[:8]}); "
            "compute them again with mindalle prepare-codes --model"
        )
    num_shards = -(-manifest.samples // manifest.shard_samples)
    missing = [shard for shard in range(num_shards) if not (folder / f"{shard:05}.json").exists()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {num_shards} shards are missing; run the same mindalle prepare-codes command "
            "again to resume"
        )
    samples = (sample for shard in range(num_shards) for sample in _read_shard(folder, shard, manifest))
    return samples, manifest.classes


def _start(out: Path, manifest: Manifest) -> None:
    """Makes the folder with its manifest, unless it exists. Raises OutputError if it has another manifest."""
    if (out / MANIFEST).exists():
        found, wanted = asdict(_read_manifest(out)), asdict(manifest)
        if odd := [key for key in wanted if found[key] != wanted[key]]:
            raise OutputError(
                f"{out}: holds codes that differ from these in {', '.join(odd)}; name another folder, or remove it"
            )
        return
    check_output(out, overwrite=out.is_dir())  # an empty folder may be used
    check_writable(out)
    need_bytes = manifest.samples * manifest.codes * np.dtype(manifest.dtype).itemsize
    check_free_disk(out, need_bytes, "codes")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / MANIFEST, asdict(manifest))


def _write_shard(out: Path, shard: int, codes: np.ndarray, samples: list[Sample]) -> None:
    path = out / f"{shard:05}.npy"
    with disk_errors(path):
        with _replacing(path) as file:
            np.save(file, codes)
        rows = [[sample.id, list(sample.captions), sample.label] for sample in samples]
        _write_json(path.with_suffix(".json"), {"crc32": zlib.crc32(codes.data), "samples": rows})


def _read_shard(folder: Path, shard: int, manifest: Manifest) -> Iterator[Sample]:
    path = folder / f"{shard:05}.npy"
    listed = _read_json(path.with_suffix(".json"))
    try:
        crc32, rows = listed["crc32"], listed["samples"]
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}; {_AGAIN}") from None
    if codes.dtype != manifest.dtype or codes.shape != (len(rows), manifest.codes):
        raise DataError(f"{path}: is {codes.dtype} {list(codes.shape)}, which its .json does not describe; {_AGAIN}")
    if zlib.crc32(codes.data) != crc32:
        raise DataError(f"{path}: damaged, its CRC-32 is not the one in its .json; {_AGAIN}")
    for row, (name, captions, label) in zip(codes, rows, strict=True):
        yield Sample(name, None, codes=row, captions=captions, label=label)


_AGAIN = "remove its .json and run the same mindalle prepare-codes command again"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file, which is renamed to `path` when it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        yield file
        to_disk(file)
    os.replace(partial, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with _replacing(path) as file:
        file.write(json.dumps(content).encode())


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    content = _read_json(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format {version!r}; this version reads format {FORMAT_VERSION}")
    try:
        return Manifest(**content)
    except TypeError as error:
        raise DataError(f"{path}: damaged: {one_line(error)}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content
