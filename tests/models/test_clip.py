"""The CLIP network against transformers' CLIPModel, and the rules of its inputs."""

import clip_oracle
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mindalle_jax.interop.clip import write_clip

TOLERANCE = 1e-4
"""Absolute, on features of order 1 in float32; the two programs were seen to differ by 2e-6."""


@pytest.fixture(scope="module", params=clip_oracle.CONFIGS)
def model(request, tmp_path_factory):
    return clip_oracle.random_model(request.param, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def features(model):
    """Of the texts and pictures of clip_oracle.inputs, in float32."""
    return clip_oracle.features(model)


def test_features_agree_with_transformers(model, features, tmp_path):
    """The end token taken at the wrong place, a mask or an epsilon forgotten, the GELUs exchanged."""
    pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")
    write_clip(tmp_path / "clip", model)
    theirs = clip_oracle.transformers_model(model.config, load_file(tmp_path / "clip" / "model.safetensors"))
    for ours, other in zip(features, clip_oracle.transformers_features(theirs, model.config), strict=True):
        assert ours.dtype == np.float32
        assert 0.5 < ours.std() < 2
        np.testing.assert_allclose(ours, other, rtol=0, atol=TOLERANCE)


def test_what_follows_the_first_end_token_has_no_effect(features):
    """So it does not matter what a caller pads with, the end token included."""
    text, _ = features
    np.testing.assert_allclose(text[:5], text[5:], rtol=0, atol=1e-5)  # rows of one batch may be added up differently
    assert np.abs(text[0] - text[1]).max() > 0.1


@pytest.mark.parametrize("model", ["quick-gelu"], indirect=True)
def test_bfloat16_features_are_near_float32(model, features):
    """8 bits, about 20 roundings one after the other on values of order 1, sqrt(20) * 2**-9 = 0.01 in the mean; three
    times that is taken, for the values between the blocks are larger than 1."""
    for exact, half in zip(features, clip_oracle.features(model, jnp.bfloat16), strict=True):
        assert half.dtype == np.float32
        assert 1e-4 < np.sqrt(np.mean((half - exact) ** 2)) < 0.03
