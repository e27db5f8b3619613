"""How parameters and batches are sharded over devices: one table of logical axes, and one rule per strategy.

A mesh has the axes data, fsdp and tensor, each of size 1 or more. Batches are split over data and fsdp. A strategy
splits a parameter by the names of its axes. A rule lists the names that a mesh axis takes. The first of these names
that the parameter has, with a size that the mesh axis divides, is split.

    strategy       mesh of 8      blocks/fc1/weight [layer, mlp, embed]
    replicated     8, 1, 1        on every device
    fsdp           1, 8, 1        [layer, mlp, embed / 8]
    tensor         1, 1, 8        [layer, mlp / 8, embed]
    fsdp+tensor    1, 4, 2        [layer, mlp / 2, embed / 4]
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.errors import ConfigError
from mindalle_jax.runtime.devices import training_devices

Strategy = Literal["replicated", "fsdp", "tensor", "fsdp+tensor"]
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""The mesh axes that split a batch."""

# Pattern of a path in the layout of training -> names of the axes. `heads` is the width of all heads together.
LOGICAL_AXES = [
    (r"(tok_emb_img|tok_emb_txt)/embedding", ("vocab", "embed")),
    (r"(pos_emb_img|pos_emb_txt)/embedding", ("position", "embed")),
    (r"sos/embedding", ("class", "embed")),
    (r"(head|head_img|head_txt)/weight", ("vocab", "embed")),
    (r"ln_f/(scale|bias)", ("embed",)),
    (r"blocks/(ln1|ln2)/(scale|bias)", ("layer", "embed")),
    (r"blocks/qkv/weight", ("layer", "qkv", "heads", "embed")),
    (r"blocks/qkv/bias", ("layer", "qkv", "heads")),
    (r"blocks/proj/weight", ("layer", "embed", "heads")),
    (r"blocks/proj/bias", ("layer", "embed")),
    (r"blocks/fc1/weight", ("layer", "mlp", "embed")),
    (r"blocks/fc1/bias", ("layer", "mlp")),
    (r"blocks/fc2/weight", ("layer", "embed", "mlp")),
    (r"blocks/fc2/bias", ("layer", "embed")),
]

# Mesh axis -> names that it takes, in order of preference. A parameter without any of them is on every device.
_FSDP = {"fsdp": ("embed", "heads", "mlp")}
_TENSOR = {"tensor": ("heads", "mlp", "vocab")}
RULES: dict[Strategy, dict[str, tuple[str, ...]]] = {
    "replicated": {},
    "fsdp": _FSDP,
    "tensor": _TENSOR,
    "fsdp+tensor": _TENSOR | _FSDP,
}


def make_mesh(strategy: Strategy, shape: Mapping[str, int], devices: list[Any] | None = None) -> Mesh:
    """Returns the mesh of a strategy over `devices`, by default all devices.

    shape: sizes of some mesh axes. The axis with the name of the strategy (data for replicated, fsdp for fsdp+tensor)
    takes the devices that are left. Raises ConfigError if the sizes do not fit the number of devices.
    """
    devices = training_devices() if devices is None else devices
    rest = {"replicated": "data", "tensor": "tensor"}.get(strategy, "fsdp")
    sizes = {axis: shape.get(axis, 1) for axis in AXES}
    if rest not in shape:
        fixed = math.prod(sizes.values())
        sizes[rest] = len(devices) // fixed if fixed <= len(devices) else 1
    if math.prod(sizes.values()) != len(devices):
        given = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(f"sharding: {given} is not {len(devices)}, the number of devices")
    for axis in ("fsdp", "tensor"):
        if sizes[axis] > 1 and axis not in RULES[strategy]:
            raise ConfigError(f"sharding: strategy {strategy!r} splits nothing over {axis}; use another axis")
    # Mesh, because the axes of jax.make_mesh are explicit by default.
    return Mesh(np.array(devices).reshape([sizes[axis] for axis in AXES]), AXES)


def logical_axes(path: str) -> tuple[str, ...]:
    """Returns the names of a parameter's axes by its path. LoRA adapters have none: they are on every device."""
    if "/lora_" in path:
        return ()
    hits = [axes for pattern, axes in LOGICAL_AXES if re.fullmatch(pattern, path)]
    if len(hits) != 1:
        raise AssertionError(f"{len(hits)} rows of LOGICAL_AXES match {path!r}; there must be one")
    return hits[0]


def param_spec(path: str, shape: tuple[int, ...], strategy: Strategy, mesh: Mesh) -> PartitionSpec:
    """Returns how a strategy splits a parameter of this path and shape over the mesh."""
    names = logical_axes(path)
    spec: list[str | None] = [None] * len(names)
    for axis, wanted in RULES[strategy].items():
        places = [
            i
            for name in wanted
            for i, own in enumerate(names)
            if own == name and spec[i] is None and shape[i] % mesh.shape[axis] == 0
        ]
        if places and mesh.shape[axis] > 1:
            spec[places[0]] = axis
    return PartitionSpec(*spec)


def param_shardings(shapes: Mapping[str, tuple[int, ...]], strategy: Strategy, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter by its path."""
    return {path: NamedSharding(mesh, param_spec(path, shape, strategy, mesh)) for path, shape in shapes.items()}


def batch_devices(mesh: Mesh) -> int:
    """Returns the number of parts into which the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


@dataclasses.dataclass(frozen=True)
class SplitByBatch:
    """Forces hidden states [b, ...] to be split by batch only.

    Without it XLA may split their width, as that of the parameters. Then it must add up partial products in each layer.
    """

    mesh: Mesh

    def __call__(self, x: jax.Array) -> jax.Array:
        spec = PartitionSpec(BATCH, *[None] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
