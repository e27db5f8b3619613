"""Low-rank adapters: their shapes and files, and how they are added to weights.

W x becomes W x + alpha / rank B A x: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. A weight
[(l,) *out, in] has `lora_a` [(l,) r, in] and `lora_b` [(l,) *out, r] beside it.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors

from mindalle_jax.config.file import load_config
from mindalle_jax.errors import CheckpointError, ConfigError, one_line
from mindalle_jax.storage.weights import fingerprint, leaf_shapes, read_manifest

LORA_SCALE, BASE_FINGERPRINT = "lora_scale", "base_fingerprint"
"""Keys in the metadata of adapters.safetensors: alpha / rank, and weights.fingerprint of the base model."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The section `training.lora`: low-rank adapters, trained instead of the weights (Hu et al., 2021)."""

    rank: int = 0
    """Rank of the adapters; 0: no adapters."""
    alpha: float = 16.0
    """The product of an adapter is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("blocks/qkv/weight", "blocks/proj/weight", "blocks/fc1/weight", "blocks/fc2/weight")
    """Patterns of the parameters that get an adapter. One pattern must match the complete path of a parameter."""


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Returns whether one of the patterns matches the complete path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def adapter_shapes(shapes: Mapping[str, tuple[int, ...]], lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the adapters by path. Raises ConfigError if no target matches, or one that is no weight."""
    targets = [path for path in shapes if matches(path, lora.targets)]
    if not targets:
        raise ConfigError(f"training.lora.targets {list(lora.targets)} match none of {', '.join(shapes)}")
    adapters = {}
    for path in targets:
        module, _, last = path.rpartition("/")
        if last != "weight":
            raise ConfigError(f"training.lora.targets match {path}, which is not a weight of a linear layer")
        lead = 1 if path.startswith("blocks/") else 0
        layers, (*out, width) = shapes[path][:lead], shapes[path][lead:]
        adapters[f"{module}/lora_a"] = (*layers, lora.rank, width)
        adapters[f"{module}/lora_b"] = (*layers, *out, lora.rank)
    return adapters


def merged(
    path: str,
    weight: np.ndarray,
    adapters: Mapping[str, np.ndarray | jax.Array],
    scale: float,
    layer: int | None = None,
) -> np.ndarray:
    """Returns the weight at `path`, or one layer of it, with its adapter added, float32; unchanged if it has none."""
    module, _, last = path.rpartition("/")
    if last != "weight" or f"{module}/lora_a" not in adapters:
        return weight
    if path.startswith("blocks/") and layer is None:
        # Layer by layer, so that a run and `mindalle convert --adapters` get the same bits.
        return np.stack([merged(path, part, adapters, scale, i) for i, part in enumerate(weight)])
    a, b = (np.asarray(adapters[f"{module}/lora_{name}"], np.float32) for name in "ab")
    a, b = (a, b) if layer is None else (a[layer], b[layer])
    return weight.astype(np.float32, copy=False) + np.float32(scale) * np.einsum("...r,ri->...i", b, a)


class Adapters(NamedTuple):
    """The adapters of a run, as `load_adapters` reads them."""

    leaves: dict[str, np.ndarray]
    """float32 `lora_a` and `lora_b` by path."""
    scale: float
    """alpha / rank"""


def load_adapters(file: Path, base: Path) -> Adapters:
    """Reads the adapters.safetensors of a run that started from the model folder `base`.

    Raises CheckpointError if the file is missing, damaged, not of a run or of another model than `base`, or if adapters
    do not fit its weights; the message lists all that do not fit.
    """
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            about = opened.metadata() or {}
            leaves = {path: opened.get_tensor(path) for path in opened.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or damaged: {one_line(error)}") from None
    try:
        scale, theirs = float(about[LORA_SCALE]), about[BASE_FINGERPRINT]
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{file}: not the adapters of a run: {LORA_SCALE} and {BASE_FINGERPRINT} are not in its metadata"
        ) from None
    ours = fingerprint(read_manifest(base)["tensors"])
    if theirs != ours:
        raise CheckpointError(
            f"{file}: adapters of another model than {base}: the fingerprint of its weights was {theirs} and is {ours}"
        )
    odd = _misfits(leaves, leaf_shapes(load_config(base / "config.yaml"), "stage2"))
    if odd or not leaves:
        raise CheckpointError(f"{file}: does not fit the weights of {base}: {'; '.join(odd) or 'it is empty'}")
    infinite = [path for path, leaf in leaves.items() if not np.isfinite(leaf).all()]
    if infinite or not math.isfinite(scale):
        raise CheckpointError(f"{file}: NaN or infinite values in {', '.join(infinite) or 'lora_scale'}")
    return Adapters(leaves, scale)


def _misfits(leaves: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns a text per fault in the paths, shapes and dtypes of adapters."""
    odd = []
    for module in sorted({path.rpartition("/")[0] for path in leaves}):
        names = {path.rpartition("/")[2] for path in leaves if path.rpartition("/")[0] == module}
        if names != {"lora_a", "lora_b"} or f"{module}/weight" not in shapes:
            odd += [f"{module}/{name} is unknown, or without its other half" for name in sorted(names)]
            continue
        a, b = leaves[f"{module}/lora_a"], leaves[f"{module}/lora_b"]
        rank = a.shape[-2] if a.ndim > 1 else 1
        fitting = adapter_shapes(shapes, LoraConfig(rank=rank, targets=(re.escape(f"{module}/weight"),)))
        odd += [
            f"{path} is {leaf.dtype}{list(leaf.shape)}, wanted float32{list(fitting[path])}"
            for path, leaf in ((f"{module}/lora_a", a), (f"{module}/lora_b", b))
            if leaf.shape != fitting[path] or leaf.dtype != np.float32
        ]
    return odd
