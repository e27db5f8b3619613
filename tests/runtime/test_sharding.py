"""sharding.py: the table names every parameter once, the rules split it evenly, and nobody holds it whole."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from mindalle_jax.config.schema import Config, Stage2Config, Stage2Hparams
from mindalle_jax.errors import ConfigError
from mindalle_jax.runtime.sharding import (
    AXES,
    BATCH,
    LOGICAL_AXES,
    RULES,
    batch_devices,
    logical_axes,
    make_mesh,
    param_shardings,
    param_spec,
)
from mindalle_jax.storage.adapters import LoraConfig, adapter_shapes
from mindalle_jax.storage.weights import leaf_shapes, load_stacked

KINDS = {
    "text": Config(),  # the released 1.3B
    "class": Config(stage2=Stage2Config(type="igpt", use_cls_cond=True, hparams=Stage2Hparams(n_classes=1000))),
    "free": Config(stage2=Stage2Config(type="igpt", use_cls_cond=False)),
}
MESHES = {
    # name: strategy, (data, fsdp, tensor)
    "replicated 8": ("replicated", (8, 1, 1)),
    "fsdp 8": ("fsdp", (1, 8, 1)),
    "fsdp 16": ("fsdp", (1, 16, 1)),
    "data x fsdp 16": ("fsdp", (2, 8, 1)),
    "tensor 8": ("tensor", (1, 1, 8)),
    "tensor 16": ("tensor", (1, 1, 16)),
    "fsdp+tensor 8": ("fsdp+tensor", (1, 4, 2)),
    "fsdp+tensor 16": ("fsdp+tensor", (1, 4, 4)),
}


def abstract(sizes: tuple[int, ...]) -> AbstractMesh:
    """A mesh without devices, which is all that shapes need."""
    return AbstractMesh(sizes, AXES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_one_row_of_as_many_axes(kind):
    shapes = leaf_shapes(KINDS[kind], "stage2")
    for path, shape in shapes.items():
        assert len(logical_axes(path)) == len(shape), path


def test_every_row_is_of_some_parameter():
    """A row that matches nothing is a parameter that was renamed, and is on every device since."""
    import re

    paths = {path for config in KINDS.values() for path in leaf_shapes(config, "stage2")}
    assert [pattern for pattern, _ in LOGICAL_AXES if not any(re.fullmatch(pattern, path) for path in paths)] == []


def test_every_rule_is_of_some_axis():
    names = {name for _, axes in LOGICAL_AXES for name in axes}
    for strategy, rules in RULES.items():
        assert set(rules) <= set(AXES), strategy
        assert {name for wanted in rules.values() for name in wanted} <= names, strategy


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(AssertionError, match="0 rows of LOGICAL_AXES match 'blocks/new/weight'"):
        logical_axes("blocks/new/weight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_released_sizes_are_split_evenly(kind, mesh):
    """Axes that are split divide, no mesh axis is used twice, and nearly all of the 1.3B is split all ways."""
    strategy, sizes = MESHES[mesh]
    mesh = abstract(sizes)
    shapes = leaf_shapes(KINDS[kind], "stage2")
    held = 0
    for path, shape in shapes.items():
        spec = param_spec(path, shape, strategy, mesh)
        used = [axis for axis in spec if axis is not None]
        assert len(used) == len(set(used)) and set(used) <= set(RULES[strategy]), path
        parts = [mesh.shape[axis] if axis else 1 for axis in spec]
        assert all(size % part == 0 for size, part in zip(shape, parts, strict=True)), path
        held += math.prod(shape) // math.prod(parts)
    ways = sizes[1] * sizes[2]
    whole = sum(math.prod(shape) for shape in shapes.values())
    # Every matrix is split; gains, biases and tables of positions are under 0.2 % of the parameters.
    assert whole / ways <= held <= whole / ways + 0.002 * whole


@pytest.mark.parametrize(
    ("strategy", "sizes", "path", "expected"),
    [
        ("replicated", (8, 1, 1), "blocks/fc1/weight", (None, None, None)),
        ("fsdp", (1, 8, 1), "blocks/fc1/weight", (None, None, "fsdp")),
        ("tensor", (1, 1, 8), "blocks/fc1/weight", (None, "tensor", None)),
        ("fsdp+tensor", (1, 4, 2), "blocks/fc1/weight", (None, "tensor", "fsdp")),
        ("fsdp+tensor", (1, 4, 2), "blocks/proj/weight", (None, "fsdp", "tensor")),
        ("fsdp", (1, 8, 1), "blocks/qkv/weight", (None, None, None, "fsdp")),
        ("tensor", (1, 1, 8), "head_img/weight", ("tensor", None)),
        ("tensor", (1, 1, 8), "blocks/fc2/bias", (None, None)),
    ],
)
def test_worked_examples(strategy, sizes, path, expected):
    """Those of the module's table among them."""
    shape = leaf_shapes(KINDS["text"], "stage2")[path]
    assert param_spec(path, shape, strategy, abstract(sizes)) == PartitionSpec(*expected)


def test_what_does_not_divide_is_not_split():
    """Seven devices divide none of the widths."""
    shapes = leaf_shapes(KINDS["class"], "stage2")
    for path, shape in shapes.items():
        assert set(param_spec(path, shape, "fsdp", abstract((1, 7, 1)))) <= {None}


def test_adapters_are_on_every_device():
    shapes = adapter_shapes(leaf_shapes(KINDS["text"], "stage2"), LoraConfig(rank=8))
    assert len(shapes) == 8
    for path, shape in shapes.items():
        assert param_spec(path, shape, "fsdp+tensor", abstract((1, 4, 2))) == PartitionSpec()


@pytest.mark.parametrize(
    ("strategy", "shape", "sizes"),
    [
        ("replicated", {}, (8, 1, 1)),
        ("fsdp", {}, (1, 8, 1)),
        ("fsdp", {"data": 2}, (2, 4, 1)),
        ("tensor", {"data": 4}, (4, 1, 2)),
        ("fsdp+tensor", {"tensor": 2}, (1, 4, 2)),
        ("fsdp+tensor", {"tensor": 2, "data": 2}, (2, 2, 2)),
        ("fsdp", {"fsdp": 8}, (1, 8, 1)),
    ],
)
def test_the_named_axis_takes_what_is_left(strategy, shape, sizes):
    mesh = make_mesh(strategy, shape)
    assert tuple(mesh.shape[axis] for axis in AXES) == sizes
    assert batch_devices(mesh) == sizes[0] * sizes[1] and BATCH == AXES[:2]
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in jax.devices())


@pytest.mark.parametrize(
    ("strategy", "shape", "text"),
    [
        ("fsdp", {"fsdp": 3}, "data 1 x fsdp 3 x tensor 1 is not 8, the number of devices"),
        ("fsdp", {"data": 3}, "data 3 x fsdp 2 x tensor 1 is not 8"),
        ("replicated", {"data": 16}, "data 16 x fsdp 1 x tensor 1 is not 8"),
        ("fsdp", {"data": 16}, "data 16 x fsdp 1 x tensor 1 is not 8"),
        ("replicated", {"fsdp": 2}, "strategy 'replicated' splits nothing over fsdp; use another axis"),
        ("fsdp", {"tensor": 2}, "strategy 'fsdp' splits nothing over tensor"),
        ("tensor", {"fsdp": 2}, "strategy 'tensor' splits nothing over fsdp"),
    ],
)
def test_sizes_that_do_not_fit(strategy, shape, text):
    with pytest.raises(ConfigError) as error:
        make_mesh(strategy, shape)
    assert text in str(error.value)


@pytest.mark.parametrize("strategy", ["fsdp", "tensor", "fsdp+tensor"])
def test_no_device_holds_a_parameter_whole(tiny_model_folder, tiny_config, strategy):
    """Loading once put the whole array on the first device before it was split."""
    mesh = make_mesh(strategy, {"tensor": 2} if strategy == "fsdp+tensor" else {})
    shapes = leaf_shapes(tiny_config, "stage2")
    dtypes = dict.fromkeys(shapes, np.dtype("float32"))
    leaves = load_stacked(tiny_model_folder, "stage2", tiny_config, dtypes, param_shardings(shapes, strategy, mesh))
    split = 0
    for path, leaf in leaves.items():
        parts = [mesh.shape[axis] if axis else 1 for axis in param_spec(path, shapes[path], strategy, mesh)]
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert shard.data.size * math.prod(parts) == leaf.size, path
        split += math.prod(parts) == 8
        if strategy == "fsdp":
            assert math.prod(parts) == 8, f"{path} is whole on every device"
    assert split >= (len(leaves) if strategy == "fsdp" else 6)
    everywhere = param_shardings(shapes, "replicated", make_mesh("replicated", {}))
    whole = load_stacked(tiny_model_folder, "stage2", tiny_config, dtypes, everywhere)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, whole[path])
