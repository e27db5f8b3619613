"""interop/clip_layouts.py: each parameter has its place in every layout, and comes back from it unchanged."""

from typing import get_args

import numpy as np
import pytest

from mindalle_jax.interop.clip_layouts import Layout, clip_leaf_shapes, clip_slots
from mindalle_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig

CONFIG = ClipConfig(
    ClipTextConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, vocab_size=50,
                   max_position_embeddings=7, eos_token_id=49),
    ClipVisionConfig(hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=2, image_size=12,
                     patch_size=4),
    projection_dim=48,
)  # fmt: skip


@pytest.mark.parametrize("layout", get_args(Layout))
def test_what_a_slot_takes_from_a_file_is_the_parameter(layout):
    """Numbers that tell their place: of queries, keys and values together each third is its own."""
    shapes = clip_leaf_shapes(CONFIG)
    slots = clip_slots(CONFIG, layout)
    assert sorted(slot.path for slot in slots) == sorted(shapes)
    taken = {}
    for slot in slots:
        whole = np.arange(np.prod(slot.shape)).reshape(slot.shape)
        array = slot.from_file(whole)
        assert array.shape == shapes[slot.path], slot.path
        if slot.third is None:
            np.testing.assert_array_equal(slot.to_file(array), whole)
        taken.setdefault((slot.key, slot.shape), []).append(array.ravel())
    for (_, shape), parts in taken.items():  # together they are all of the file's tensor, each number once
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(np.prod(shape)))


def test_only_openai_has_three_parameters_under_a_key():
    keys = {layout: [slot.key for slot in clip_slots(CONFIG, layout)] for layout in get_args(Layout)}
    assert len(set(keys["torch"])) == len(keys["torch"]) == len(set(keys["flax"])) == len(clip_leaf_shapes(CONFIG))
    assert len(keys["openai"]) - len(set(keys["openai"])) == 2 * 2 * (2 + 3)  # two of three, weight and bias, layers
