"""Low-rank adapters: W x becomes W x + alpha / rank B A x, and A and B are trained in place of W.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. A weight [(l,) *out, in] gets `lora_a`
[(l,) r, in], drawn at random, and `lora_b` [(l,) *out, r], zeros, beside it; nothing changes before the first update.
"""

import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from mindalle_jax.errors import ConfigError
from mindalle_jax.training.config import LoraConfig


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def adapter_shapes(shapes: Mapping[str, tuple[int, ...]], lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters by path. Raises ConfigError where the targets match nothing, or what is no matrix."""
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


def init_adapters(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """float32: A from N(0, 1 / in), B zeros."""
    adapters = {}
    for number, (path, shape) in enumerate(sorted(shapes.items())):
        if path.endswith("/lora_a"):
            draw = np.random.default_rng([seed, number]).standard_normal(shape, np.float32)
            adapters[path] = draw * np.float32(shape[-1] ** -0.5)
        else:
            adapters[path] = np.zeros(shape, np.float32)
    return adapters


def merged(path: str, weight: np.ndarray, adapters: Mapping[str, np.ndarray | jax.Array], scale: float) -> np.ndarray:
    """The weight at `path` with its adapter added, float32; as it is if it has none."""
    module = path.rpartition("/")[0]
    if f"{module}/lora_a" not in adapters or not path.endswith("/weight"):
        return weight
    a, b = (np.asarray(adapters[f"{module}/lora_{name}"], np.float32) for name in "ab")
    if path.startswith("blocks/"):
        return weight + np.float32(scale) * np.einsum("l...r,lri->l...i", b, a)
    return weight + np.float32(scale) * np.einsum("...r,ri->...i", b, a)
