"""Fresh low-rank adapters: A is random and B is zero, so nothing changes before the first step."""

from collections.abc import Mapping

import numpy as np


def init_adapters(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Returns adapters, float32 by path: A is sampled from N(0, 1 / in), and B is zero."""
    adapters = {}
    for number, (path, shape) in enumerate(sorted(shapes.items())):
        if path.endswith("/lora_a"):
            normal = np.random.default_rng([seed, number]).standard_normal(shape, np.float32)
            adapters[path] = normal * np.float32(shape[-1] ** -0.5)
        else:
            adapters[path] = np.zeros(shape, np.float32)
    return adapters
