"""digest.py: one number for the same bits wherever they are, another one for other bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import MESHES, mesh_of, sharding_of

from mindalle_jax.training.checkpoint import digests


def digest(array) -> str:
    return digests({"x": array})["x"]


def mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def formula(array: np.ndarray) -> str:
    words = array.reshape(-1).view(f"u{array.itemsize}").astype(np.uint32)
    index = np.arange(array.size, dtype=np.uint32)
    lanes = [mix(words ^ mix(index ^ np.uint32(seed))).sum(dtype=np.uint32) for seed in (0x9E3779B9, 0x7F4A7C15)]
    return "".join(f"{lane:08x}" for lane in lanes)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        *(((8, 24), dtype) for dtype in ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")),
        *((shape, "float32") for shape in ((), (0, 3), (48,), (4, 3, 16))),
    ],
)
def test_the_digest_is_its_formula_on_every_mesh(shape, dtype):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 2 if dtype == "bool" else 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
    array = data.view(jnp.dtype(dtype))[..., 0]
    assert digest(jnp.asarray(array)) == formula(array)
    for name in MESHES:
        assert digest(jax.device_put(array, sharding_of(mesh_of(name), shape))) == formula(array), name


@pytest.mark.parametrize("dtype", ["uint32", "uint16", "uint8"])
def test_any_flipped_bit_and_any_exchange_change_both_lanes(dtype):
    """A flipped bit because the mixing is a bijection, an exchange as good as certainly."""
    rng = np.random.default_rng(1)
    array = rng.integers(0, np.iinfo(dtype).max, (5, 7), dtype)
    changed = []
    for i in range(array.size):
        flipped = array.copy()
        flipped.flat[i] ^= np.array(1 << rng.integers(8 * array.itemsize), dtype)
        exchanged = array.copy()
        j = next(j for j in rng.permutation(array.size) if array.flat[j] != array.flat[i])
        exchanged.flat[[i, j]] = exchanged.flat[[j, i]]
        changed += [flipped, exchanged]
    before = digest(array)
    for after in digests({str(i): other for i, other in enumerate(changed)}).values():
        assert after[:8] != before[:8] and after[8:] != before[8:]


def test_zeros_are_told_from_nothing_and_by_their_number():
    assert len({digest(jnp.zeros(size)) for size in range(6)}) == 6
