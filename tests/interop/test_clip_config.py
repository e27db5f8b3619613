"""interop/clip_config.py: a config.json means what it means to transformers, or is refused with a reason."""

import dataclasses

import pytest

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.clip import read_clip
from mindalle_jax.interop.clip_config import parse_clip_config
from mindalle_jax.models.clip import ClipConfig

MINIMAL = {"model_type": "clip", "text_config": {}, "vision_config": {}}
CONFIG_FILES = {
    "nothing but the type": {"model_type": "clip"},
    "empty sections": MINIMAL,
    "null sections": {"model_type": "clip", "text_config": None, "vision_config": None},
    "early": MINIMAL | {"text_config": {"eos_token_id": 2, "bos_token_id": 0}, "text_config_dict": None},
    "both": MINIMAL
    | {
        "projection_dim": 768,
        "text_config": {"hidden_size": 512, "eos_token_id": 2, "hidden_act": "gelu"},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "projection_dim": 5},
        "vision_config": {"image_size": 336, "patch_size": 14, "hidden_act": "gelu"},
        "vision_config_dict": {"patch_size": 16},
    },
    "of another time": MINIMAL | {"torch_dtype": "float32", "vision_config": {"num_channels": 3, "dropout": 0.0}},
}


def test_our_defaults_are_those_of_vit_b_32():
    assert parse_clip_config({"model_type": "clip"}, "x") == ClipConfig()


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_configs_mean_what_they_mean_to_transformers(case):
    import transformers

    ours, theirs = parse_clip_config(CONFIG_FILES[case], "x"), transformers.CLIPConfig.from_dict(CONFIG_FILES[case])
    assert ours.projection_dim == theirs.projection_dim
    for tower, other in ((ours.text, theirs.text_config), (ours.vision, theirs.vision_config)):
        assert dataclasses.asdict(tower) == {name: getattr(other, name) for name in dataclasses.asdict(tower)}


def with_text(**fields) -> dict:
    return MINIMAL | {"text_config": fields}


def with_vision(**fields) -> dict:
    return MINIMAL | {"vision_config": fields}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([], r"model_type is \[\], only 'clip' is read"),
        ({}, "model_type is None, only 'clip' is read"),
        (MINIMAL | {"model_type": "siglip"}, "is SigLIP, which cannot rank here"),
        (MINIMAL | {"text_config": 3}, "text_config is 3, not a section"),
        (MINIMAL | {"projection_dim": None}, "projection_dim is None; it must be a whole number from 1"),
        (with_text(hidden_act="relu"), "text_config.hidden_act is 'relu'; quick_gelu and gelu are known"),
        (with_vision(hidden_act=["gelu"]), r"vision_config.hidden_act is \['gelu'\]; quick_gelu"),
        (with_vision(num_channels=4), "vision_config.num_channels is 4, it must be 3"),
        (
            with_text(num_attention_heads=7),
            "text_config.num_attention_heads is 7, which does not divide hidden_size 512",
        ),
        (with_vision(hidden_size=770), "num_attention_heads is 12, which does not divide hidden_size 770"),
        (
            with_text(num_hidden_layers=10**9),
            "num_hidden_layers is 1000000000; it must be a whole number from 1 to 200",
        ),
        (with_text(vocab_size=True), "text_config.vocab_size is True; it must be a whole number"),
        (with_text(hidden_size=512.0), "text_config.hidden_size is 512.0; it must be a whole number"),
        (with_vision(image_size=[224, 224]), r"vision_config.image_size is \[224, 224\]; it must be a whole number"),
        (with_vision(image_size=0), "vision_config.image_size is 0; it must be a whole number from 1"),
        (with_vision(image_size=1 << 20, patch_size=1), "patches in an image; 1 to 65,536 are possible"),
        (with_vision(image_size=8), "0 patches in an image"),
        (with_vision(layer_norm_eps=0), "layer_norm_eps is 0; it must be a number between 0 and 1"),
        (with_text(layer_norm_eps=float("nan")), "layer_norm_eps is nan; it must be a number between 0 and 1"),
        (with_text(eos_token_id=[2]), r"eos_token_id is \[2\]; vocab_size is 49408"),
        (with_text(vocab_size=100), "eos_token_id is 49407; vocab_size is 100"),
    ],
)
def test_configs_that_are_not_understood_are_refused(raw, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        parse_clip_config(raw, "config.json")
    assert str(caught.value).startswith("config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("siglip", "is SigLIP, which cannot rank here"),
        ("M-CLIP", "is the multilingual text tower of a CLIP model alone, which"),
        ("clip_vision_model", "is the image tower of a CLIP model alone, which"),
        ("chinese_clip", "is Chinese CLIP"),
        ("bert", "model_type is 'bert', only 'clip' is read"),
        (["clip"], "model_type is .*, only 'clip' is read"),
        (None, "model_type is None, only 'clip' is read"),
    ],
)
def test_other_models_are_named_with_what_to_take_instead(kind, said):
    with pytest.raises(CheckpointError, match=f"x: {said}.*; take a CLIP model .*openai/clip-vit-base-patch32"):
        parse_clip_config({"model_type": kind}, "x")


@pytest.mark.parametrize(
    "name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors", "open_clip_config.json"]
)
def test_openclips_own_layout_is_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="is in the layout of OpenCLIP, which is not read; take a CLIP model"):
        read_clip(tmp_path)
