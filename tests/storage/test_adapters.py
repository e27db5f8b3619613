"""storage/adapters.py: shapes of adapters and what they add. Runs with adapters: training/test_lora.py."""

import numpy as np
import pytest

from mindalle_jax.errors import ConfigError
from mindalle_jax.storage.adapters import LoraConfig, adapter_shapes, matches, merged

SHAPES = {"blocks/qkv/weight": (2, 3, 4, 8, 6), "blocks/qkv/bias": (2, 3, 4, 8), "head_img/weight": (10, 6)}


def test_a_pattern_matches_a_whole_path():
    assert matches("blocks/qkv/weight", ["head", "blocks/.*/weight"])
    assert not matches("blocks/qkv/weight", ["qkv", "blocks/qkv"])


def test_adapters_have_the_shapes_of_their_weights():
    lora = LoraConfig(rank=2, targets=("blocks/qkv/weight", "head_img/weight"))
    assert adapter_shapes(SHAPES, lora) == {
        "blocks/qkv/lora_a": (2, 2, 6),
        "blocks/qkv/lora_b": (2, 3, 4, 8, 2),
        "head_img/lora_a": (2, 6),
        "head_img/lora_b": (10, 2),
    }


@pytest.mark.parametrize(("target", "message"), [("none", "match none of"), ("blocks/qkv/bias", "is not a weight")])
def test_targets_that_cannot_be_adapted(target, message):
    with pytest.raises(ConfigError, match=message):
        adapter_shapes(SHAPES, LoraConfig(rank=2, targets=(target,)))


def test_what_is_added_is_scale_times_b_a_layer_by_layer():
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(SHAPES, LoraConfig(rank=2, targets=("blocks/qkv/weight",)))
    adapters = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    weight = rng.standard_normal(SHAPES["blocks/qkv/weight"]).astype(np.float16)
    result = merged("blocks/qkv/weight", weight, adapters, 0.5)
    a, b = adapters["blocks/qkv/lora_a"], adapters["blocks/qkv/lora_b"]
    expected = weight.astype(np.float64) + 0.5 * np.einsum("lxyor,lri->lxyoi", b, a, dtype=np.float64)
    np.testing.assert_allclose(result, expected, atol=1e-5)  # float32 sums of two products of order 1
    assert result.dtype == np.float32
    np.testing.assert_array_equal(merged("blocks/qkv/weight", weight[1], adapters, 0.5, layer=1), result[1])
    assert merged("head_img/weight", weight, adapters, 0.5) is weight
