"""Parameters in memory: places them on the devices for sampling, describes them, and writes them to a model folder.

Functions take two layouts. In the layout of training and disk the blocks of the transformer have a leading layer axis
(blocks/qkv/weight). In the layout of sampling the blocks are separate (blocks_0/qkv/weight).
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mindalle_jax
from mindalle_jax.config.file import dump_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import CheckpointError
from mindalle_jax.models.quantization import quantize
from mindalle_jax.storage.files import check_free_disk, new_folder
from mindalle_jax.storage.model_folder import MODEL_MARKS
from mindalle_jax.storage.weights import (
    FORMAT_VERSION,
    MANIFEST,
    STAGES,
    DiskDType,
    Stage,
    count_parameters,
    leaf_shapes,
    nest,
    numpy_dtype,
    write_weights,
)
from mindalle_jax.text.tokenizer import TextTokenizer


def place_params(
    params: Mapping[str, Any], stage: Stage, config: Config, dtype: np.dtype, mesh: Mesh, *, int8: bool = False
) -> dict[str, Any]:
    """Places the parameters of a stage on every device of the mesh, in `dtype`; returns them in the layout of sampling.

    params: nested, NumPy or JAX arrays, in either layout. JAX arrays that are there in that dtype are not copied.
    int8: weights of linear layers become int8 with `weight_scale` f32 beside them, unless they are int8 already.
    Raises CheckpointError, which lists all parameters that do not fit the configuration.
    """
    leaves = _one_by_one(flax.traverse_util.flatten_dict(dict(params), sep="/"))
    _check_fit(leaves, stage, config)
    replicated, placed = NamedSharding(mesh, PartitionSpec()), {}
    for name, leaf in leaves.items():
        if name.endswith("/weight_scale") or f"{name}_scale" in leaves:
            parts = {name: leaf}
        elif int8 and name.endswith("/weight"):
            values = quantize(leaf, np.float32)
            parts = {name: values.values, f"{name}_scale": values.scale}
        elif isinstance(leaf, jax.Array):
            parts = {name: leaf if leaf.dtype == dtype else leaf.astype(dtype)}
        else:
            # A copy: on CPU a device array shares the memory of the NumPy array, which its owner may change.
            parts = {name: np.array(leaf, dtype)}
        placed |= {path: jax.device_put(part, replicated) for path, part in parts.items()}
    return nest(placed)


def describe_params(params: Mapping[str, Any], stage: Stage, config: Config) -> dict[str, dict[str, Any]]:
    """Returns the entries of a manifest, {name: {dtype, shape, crc32}}, for parameters that place_params returned."""
    entries: dict[str, dict[str, Any]] = {}
    shapes = leaf_shapes(config, stage)
    for name, _, array in _parts(params):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        entry = entries.setdefault(
            name, {"dtype": array.dtype.name, "shape": list(shapes.get(name, array.shape)), "crc32": 0}
        )
        entry["crc32"] = zlib.crc32(data, entry["crc32"])
    return entries


def write_params(
    folder: Path,
    config: Config,
    params: Mapping[Stage, Mapping[str, Any]],
    tokenizer: TextTokenizer | None,
    *,
    dtype: DiskDType = "float32",
    overwrite: bool = False,
    caption_dropout: float | None = None,
) -> None:
    """Writes a model folder from float32 parameters that place_params returned.

    dtype: number type of the weights on disk. caption_dropout: entry of the manifest (see read_manifest); None leaves
    it out. Raises OutputError or UsageError. If it fails, no part of the folder stays.
    """
    weight_bytes = sum(numpy_dtype(dtype).itemsize * count_parameters(config, stage) for stage in STAGES)
    check_free_disk(folder, weight_bytes + (64 << 20), "the model")
    manifest = {
        "format_version": FORMAT_VERSION,
        "writer": f"mindalle-jax {mindalle_jax.__version__}",
        "source": "arrays in memory",
        "tensors": {},
    }
    if caption_dropout is not None:
        manifest["caption_dropout"] = caption_dropout
    with new_folder(folder, overwrite, MODEL_MARKS) as partial:
        for stage in STAGES:
            chunks = ((name, array.astype(numpy_dtype(dtype))) for name, _, array in _parts(params[stage]))
            manifest["tensors"][stage] = write_weights(
                partial / f"{stage}.safetensors", leaf_shapes(config, stage), chunks, dtype
            )
        (partial / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer")
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _one_by_one(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Splits stacked blocks into one leaf per layer."""
    apart = {}
    for name, leaf in leaves.items():
        if not name.startswith("blocks/"):
            apart[name] = leaf
            continue
        for layer in range(leaf.shape[0]):
            apart[name.replace("blocks/", f"blocks_{layer}/", 1)] = leaf[layer]
    return apart


def _check_fit(leaves: Mapping[str, Any], stage: Stage, config: Config) -> None:
    wanted = {}
    for name, shape in leaf_shapes(config, stage).items():
        if name.startswith("blocks/"):
            wanted |= {name.replace("blocks/", f"blocks_{layer}/", 1): shape[1:] for layer in range(shape[0])}
        else:
            wanted[name] = shape
    found = {name: tuple(leaf.shape) for name, leaf in leaves.items() if not name.endswith("/weight_scale")}
    odd = [
        f"{name} is {list(found[name]) if name in found else 'missing'}, "
        f"wanted {list(wanted[name]) if name in wanted else 'nothing'}"
        for name in [*wanted, *(name for name in found if name not in wanted)]
        if found.get(name) != wanted.get(name)
    ]
    if odd:
        more = f" and {len(odd) - 10} more" if len(odd) > 10 else ""
        raise CheckpointError(f"params[{stage!r}] do not fit the configuration: {'; '.join(odd[:10])}{more}")


def _parts(params: Mapping[str, Any]) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yields (name, layer, array) in the order of the layout of training, with the layers of a tensor in a row."""
    flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    keys = []
    for name, leaf in flat.items():
        match = re.match(r"blocks_(\d+)/", name)
        keys.append((f"blocks/{name[match.end() :]}", int(match[1]), leaf) if match else (name, None, leaf))
    for name, layer, leaf in sorted(keys, key=lambda key: (key[0], key[1] or 0)):
        yield name, layer, np.asarray(leaf)
