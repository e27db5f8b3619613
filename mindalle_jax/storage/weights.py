"""Weights on disk: safetensors files, and a manifest with a CRC-32 of each tensor. Here are the one writer and reader.

A model folder holds

    config.yaml  tokenizer/  stage1.safetensors  stage2.safetensors  manifest.json  LICENSE  README.md

Tensors are named by their Flax path (blocks/qkv/weight) in the layout of training, with the layers of the transformer
stacked. Writer and reader work in chunks of at most one layer, so they need far less memory than the file is large.
"""

import functools
import hashlib
import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mindalle_jax.config.schema import Config
from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.models.quantization import quantize
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.runtime.devices import pinned
from mindalle_jax.storage.files import SYNC_BYTES, to_disk

Stage = Literal["stage1", "stage2"]
"""stage1: the VQGAN. stage2: the transformer."""
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
STAGES = ("stage1", "stage2")

DiskDType = Literal["float32", "float16", "bfloat16"]
"""Dtype of weights on disk. The compute dtype is independent of it. float16 ends at 65504."""
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""NumPy's names of the dtypes that weights may have -> the names in safetensors."""


def leaf_shapes(config: Config, stage: Stage) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter of a stage by its path, in the layout of disk. Allocates no arrays."""
    return dict(_leaf_shapes(config, stage))


@functools.cache  # tracing a network takes a second, and a conversion asks several times
def _leaf_shapes(config: Config, stage: Stage) -> tuple[tuple[str, tuple[int, ...]], ...]:
    h1, h2 = config.stage1.hparams, config.stage2.hparams
    with pinned():
        if stage == "stage1":
            images = jax.ShapeDtypeStruct((1, h1.resolution, h1.resolution, h1.in_channels), jnp.float32)
            variables = jax.eval_shape(VQGAN(config.stage1).init, jax.random.key(0), images)
        else:
            prefix = jax.ShapeDtypeStruct((1, 1 if config.image_only else h2.ctx_len_txt), jnp.int32)
            codes = jax.ShapeDtypeStruct((1, h2.ctx_len_img), jnp.int32)
            variables = jax.eval_shape(Transformer(config.stage2).init, jax.random.key(0), prefix, codes)
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return tuple((path, tuple(leaf.shape)) for path, leaf in sorted(flat.items()))


def count_parameters(config: Config, stage: Stage) -> int:
    """Returns the number of parameters of a stage."""
    return sum(math.prod(shape) for shape in leaf_shapes(config, stage).values())


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Turns {"a/b": x} into {"a": {"b": x}}."""
    return flax.traverse_util.unflatten_dict(dict(leaves), sep="/")


def write_weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], chunks: Iterable[tuple[str, np.ndarray]], dtype: str = "float32"
) -> dict[str, Any]:
    """Writes a safetensors file from consecutive chunks and returns its part of the manifest.

    shapes: shape of each tensor by name. chunks: (name, array in dtype), in the order of `shapes`; the chunks of one
    tensor follow each other and fill it in C order. Raises FileExistsError if the file exists, and OSError if it cannot
    be written.
    """
    itemsize = numpy_dtype(dtype).itemsize
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crcs, written = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0)
    with open(path, "xb") as file, ThreadPoolExecutor(1) as writer:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, array in chunks:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            writing = writer.submit(_write, file, data)  # the digest is computed meanwhile
            crcs[name] = zlib.crc32(data, crcs[name])
            written[name] += len(data)
            writing.result()
        to_disk(file)
    for name, entry in header.items():
        if written[name] != entry["data_offsets"][1] - entry["data_offsets"][0]:
            raise AssertionError(f"{name}: {written[name]} bytes were given for shape {entry['shape']}")
    return {name: {"dtype": dtype, "shape": list(shapes[name]), "crc32": crcs[name]} for name in shapes}


def _write(file: BinaryIO, data: memoryview) -> None:
    before = file.tell()
    file.write(data)
    if before // SYNC_BYTES != file.tell() // SYNC_BYTES:
        to_disk(file)


def read_weights(path: Path, tensors: Mapping[str, Any]) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yields (name, layer, array) for every tensor of a safetensors file, checking each against the manifest.

    tensors: the file's part of the manifest. Tensors of the blocks come one layer at a time. All other tensors come
    complete, with layer None. Arrays are views of the memory-mapped file. Raises CheckpointError for a file that is
    missing, damaged, or not the one that the manifest describes. A wrong digest is detected before the last part of its
    tensor is yielded.
    """
    places = _locate(path, tensors)
    # Memory-mapped, because the safetensors library copies first and takes twice the time.
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name, (dtype, shape, start) in places.items():
        leaf = np.ndarray(shape, dtype, mapped, start)
        layers = list(range(shape[0])) if name.startswith("blocks/") else [None]
        crc = 0
        for layer in layers:
            array = leaf if layer is None else leaf[layer]
            crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
            # Checked before the last part is yielded: a caller with all parts may not ask for more.
            if layer == layers[-1] and crc != tensors[name]["crc32"]:
                raise CheckpointError(
                    f"{path}: {name} is damaged: CRC-32 {crc:08x}, {MANIFEST} says {tensors[name]['crc32']:08x}; "
                    "convert or copy the model again"
                )
            yield name, layer, array


def map_weights(path: Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns complete tensors by name, as views of the memory-mapped file, after checking every digest.

    Arguments and errors are as in read_weights.
    """
    for _ in read_weights(path, tensors):
        pass
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.ndarray(shape, dtype, mapped, start) for name, (dtype, shape, start) in _locate(path, tensors).items()
    }


def _locate(path: Path, tensors: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Compares the file's header with the manifest; returns (dtype, shape, first byte) of each tensor."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:  # checks offsets and sizes
            if set(file.keys()) != set(tensors):
                odd = sorted(set(file.keys()) ^ set(tensors))
                raise CheckpointError(f"{path}: tensors differ from {MANIFEST}: {', '.join(odd[:5])}")
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {error}") from None
    places = {}
    for name, entry in tensors.items():
        found = header[name]
        if found["shape"] != entry["shape"] or found["dtype"] != _DTYPE_NAMES[entry["dtype"]]:
            raise CheckpointError(
                f"{path}: {name} is {found['dtype']} {found['shape']}, "
                f"{MANIFEST} says {entry['dtype']} {entry['shape']}"
            )
        places[name] = (numpy_dtype(entry["dtype"]), tuple(entry["shape"]), 8 + header_bytes + found["data_offsets"][0])
    return places


def numpy_dtype(name: str) -> np.dtype:
    """Returns the NumPy dtype of a DiskDType. Raises UsageError for another name."""
    if name not in _DTYPE_NAMES:
        raise UsageError(f"the dtype of weights must be one of {', '.join(_DTYPE_NAMES)}, not {name!r}")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads manifest.json: {"format_version": 1, "tensors": {stage: {name: {dtype, shape, crc32}}}, ...}.

    "caption_dropout" is the share of captions that training left blank, in [0, 1]; it is absent if nobody knows.
    "classes" are the names of the classes, if they have names; "step" is that of the run that made the weights.
    Raises CheckpointError if the file is missing, damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _check_entries(manifest["tensors"])
            if not 0 <= manifest.get("caption_dropout", 0) <= 1:
                raise ValueError(f"caption_dropout {manifest['caption_dropout']}")
            if not all(isinstance(name, str) for name in manifest.get("classes", [])):
                raise ValueError("classes are not names")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {folder} is not a converted model") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest: {type(error).__name__}: {str(error)[:100]}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {version!r}; this version reads format {FORMAT_VERSION}")
    return manifest


def _check_entries(tensors: dict[str, Any]) -> None:
    if "stage1" not in tensors or not set(tensors) <= set(STAGES):
        raise ValueError(f"stages {list(tensors)}")
    for stage in tensors.values():
        for name, entry in stage.items():
            sizes = [*entry["shape"], entry["crc32"]]
            if entry["dtype"] not in _DTYPE_NAMES or not all(type(size) is int and size >= 0 for size in sizes):
                raise ValueError(f"{name}: {entry}")


def fingerprint(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a hexadecimal SHA-256 over the dtype, shape and CRC-32 of every tensor of a model.

    tensors: {stage: {name: {dtype, shape, crc32}}}, as in a manifest. The same weights always have the same
    fingerprint: nothing else in the manifest matters.
    """
    rows = [
        [stage, name, entry["dtype"], list(entry["shape"]), entry["crc32"]]
        for stage, entries in sorted(tensors.items())
        for name, entry in sorted(entries.items())
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def check_tensors(
    folder: Path, stage: str, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Returns the manifest's tensors of a stage in the order of `shapes`, the shapes that config.yaml asks for.

    Raises CheckpointError, which lists all tensors that differ.
    """
    found = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    if found != shapes:
        odd = sorted({name for name, _ in found.items() ^ shapes.items()})
        raise CheckpointError(f"{folder}: weights of {stage} do not fit config.yaml: {', '.join(odd)}")
    return {name: tensors[name] for name in shapes}


def load_stacked(
    folder: Path, stage: Stage, config: Config, dtypes: Mapping[str, np.dtype], shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    """Loads the parameters of a stage by path, in the layout of training, each with its dtype and sharding.

    Each device gets its part from the memory-mapped file, so no device holds a complete parameter unless the sharding
    says so. Raises CheckpointError.
    """
    tensors = check_tensors(folder, stage, read_manifest(folder)["tensors"][stage], leaf_shapes(config, stage))
    leaves = {}
    for name, leaf in map_weights(folder / f"{stage}.safetensors", tensors).items():
        part: Any = lambda index, leaf=leaf, name=name: np.array(leaf[index], dtypes[name])  # noqa: E731
        leaves[name] = jax.make_array_from_callback(leaf.shape, shardings[name], part)
    return leaves


def load_params(
    folder: Path, stage: Stage, config: Config, dtype: np.dtype, mesh: Mesh, *, int8: bool = False
) -> dict[str, Any]:
    """Loads the parameters of a stage, nested, in `dtype`, on every device of the mesh, in the layout of sampling.

    Blocks are separate, as `blocks_0`, `blocks_1`, ... At most one tensor is in memory twice. int8: weights of linear
    layers become int8 with `weight_scale` f32 beside them (models/quantization.py). Raises CheckpointError.
    """
    tensors = check_tensors(folder, stage, read_manifest(folder)["tensors"][stage], leaf_shapes(config, stage))
    replicated = NamedSharding(mesh, PartitionSpec())
    leaves = {}
    for name, layer, array in read_weights(folder / f"{stage}.safetensors", tensors):
        if layer is not None:
            name = name.replace("blocks/", f"blocks_{layer}/", 1)
        if int8 and name.endswith("/weight"):
            rows = quantize(array, np.float32)
            parts = {name: rows.values, f"{name}_scale": rows.scale}
        else:
            # A copy: on CPU a device array shares the memory of the NumPy array, and this one is the mapped file.
            parts = {name: np.array(array, dtype)}
        leaves |= {name: jax.device_put(part, replicated) for name, part in parts.items()}
    return nest(leaves)
