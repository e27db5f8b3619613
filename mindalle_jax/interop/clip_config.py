"""The sizes of a CLIP model, from a config.json of Hugging Face or from the tensors of an OpenAI file."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mindalle_jax.errors import CheckpointError
from mindalle_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig

MAX_SIZE = 1 << 20  # of any number in a config: far above real models, and small enough to trace the network
MAX_LAYERS = 200
INSTEAD = "take a CLIP model of Hugging Face's transformers, such as openai/clip-vit-base-patch32"
OTHER_MODELS = {
    "siglip": "SigLIP",
    "siglip2": "SigLIP 2",
    "altclip": "AltCLIP, a CLIP model with a multilingual text tower",
    "chinese_clip": "Chinese CLIP, a CLIP model with a text tower of its own",
    "M-CLIP": "the multilingual text tower of a CLIP model alone",
    "xlm-roberta": "a multilingual text tower alone",
    "vision-text-dual-encoder": "a model of two towers of other kinds",
    "clip_vision_model": "the image tower of a CLIP model alone",
    "clip_text_model": "the text tower of a CLIP model alone",
    "clipseg": "CLIPSeg, which segments images",
    "blip": "BLIP",
    "align": "ALIGN",
}
"""model_type of a config.json -> what such a model is."""
MAX_PATCHES = 1 << 16


def parse_clip_config(raw: Any, where: str) -> ClipConfig:
    """Parses a config.json as transformers 5 does. Omitted fields have the defaults of transformers, which are ours.

    raw: the parsed JSON. where: begins each message. Raises CheckpointError for sizes that cannot be.
    """
    given = raw.get("model_type") if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or given != "clip":
        kind = OTHER_MODELS.get(given) if isinstance(given, str) else None
        said = f"is {kind}, which cannot rank here" if kind else f"model_type is {given!r:.60}, only 'clip' is read"
        raise CheckpointError(f"{where}: {said}; {INSTEAD}")
    text, vision = _section(raw, "text_config", where), _section(raw, "vision_config", where)
    if vision.get("num_channels", 3) != 3:
        raise CheckpointError(f"{where}: vision_config.num_channels is {vision['num_channels']!r:.60}, it must be 3")
    config = ClipConfig(
        _parse_tower(ClipTextConfig, text, f"{where}: text_config"),
        _parse_tower(ClipVisionConfig, vision, f"{where}: vision_config"),
        _check_size(raw.get("projection_dim", ClipConfig.projection_dim), f"{where}: projection_dim"),
    )
    _check_patches(config.vision, where)
    return config


def check_clip_config(config: ClipConfig, where: str) -> None:
    """Raises CheckpointError for sizes that no network can have. where: the name of the section in the message."""
    _parse_tower(ClipTextConfig, dataclasses.asdict(config.text), f"{where}.text")
    _parse_tower(ClipVisionConfig, dataclasses.asdict(config.vision), f"{where}.vision")
    _check_size(config.projection_dim, f"{where}.projection_dim")
    _check_patches(config.vision, f"{where}.vision")


def _check_patches(vision: ClipVisionConfig, where: str) -> None:
    patches = (vision.image_size // vision.patch_size) ** 2
    if not 1 <= patches <= MAX_PATCHES:
        raise CheckpointError(f"{where}: {patches} patches in an image; 1 to {MAX_PATCHES:,} are possible")


def _section(raw: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    # Early configs have the values a second time, under text_config_dict. Then only those count: a value that they omit
    # has its default, even if text_config has it.
    section = next((raw[key] for key in (f"{name}_dict", name) if raw.get(key) is not None), {})
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: {name} is {section!r:.60}, not a section")
    return section


_Tower = TypeVar("_Tower", ClipTextConfig, ClipVisionConfig)


def _parse_tower(kind: type[_Tower], section: dict[str, Any], where: str) -> _Tower:
    values = {field.name: section.get(field.name, field.default) for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name == "hidden_act":
            if value not in ("quick_gelu", "gelu"):
                raise CheckpointError(f"{where}.{name} is {value!r:.60}; quick_gelu and gelu are known")
        elif name == "layer_norm_eps":
            if type(value) is not float or not 0 < value < 1:
                raise CheckpointError(f"{where}.{name} is {value!r:.60}; it must be a number between 0 and 1")
        elif name == "eos_token_id":
            if type(value) is not int or not 0 <= value < values["vocab_size"]:
                raise CheckpointError(f"{where}.{name} is {value!r:.60}; vocab_size is {values['vocab_size']}")
        else:
            _check_size(value, f"{where}.{name}", MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE)
    tower = kind(**values)
    if tower.hidden_size % tower.num_attention_heads:
        raise CheckpointError(
            f"{where}.num_attention_heads is {tower.num_attention_heads}, which does not divide hidden_size "
            f"{tower.hidden_size}"
        )
    return tower


def _check_size(value: Any, where: str, largest: int = MAX_SIZE) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise CheckpointError(f"{where} is {value!r:.60}; it must be a whole number from 1 to {largest:,}")
    return value


def openai_config(shapes: Mapping[str, tuple[int, ...]], file: Path) -> ClipConfig:
    """Returns the sizes that follow from the shapes, by the rules of build_model in OpenAI's clip/model.py.

    Raises CheckpointError if the tensors are not those of an OpenAI model with a Vision Transformer.
    """
    if any(key.startswith("visual.layer1.") for key in shapes):
        raise CheckpointError(
            f"{file}: its image tower is a ResNet, which is not supported; Vision Transformers are (ViT-B-32, ViT-L-14)"
        )
    if any(key.startswith("text_model.") for key in shapes):
        raise CheckpointError(
            f"{file}: has the keys of Hugging Face; name the folder that holds it and its config.json"
        )

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != dimensions:
            raise CheckpointError(f"{file}: not a CLIP model of OpenAI, which has {key} with {dimensions} dimensions")
        return shapes[key]

    vision_width, _, _, patch_size = shape("visual.conv1.weight", 4)
    positions, _ = shape("visual.positional_embedding", 2)
    vocab_size, _ = shape("token_embedding.weight", 2)
    context_length, _ = shape("positional_embedding", 2)
    text_width, projection_dim = shape("text_projection", 2)
    grid = math.isqrt(max(positions - 1, 0))
    if grid * grid + 1 != positions:
        raise CheckpointError(f"{file}: visual.positional_embedding has {positions} rows, not 1 plus a square number")

    def tower(prefix: str, width: int) -> dict[str, Any]:
        if width % 64:
            raise CheckpointError(f"{file}: {prefix} has width {width}, not a multiple of 64, the width of a head")
        layers = {match[1] for key in shapes if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": len(layers),
            "num_attention_heads": width // 64,
        }

    # 2: as in OpenAI's encode_text, the feature is taken at the highest id of a text.
    text = {"vocab_size": vocab_size, "max_position_embeddings": context_length, "eos_token_id": 2}
    vision = {"image_size": grid * patch_size, "patch_size": patch_size}
    raw = {
        "model_type": "clip",
        "projection_dim": projection_dim,
        "text_config": text | tower("transformer.resblocks", text_width),
        "vision_config": vision | tower("visual.transformer.resblocks", vision_width),
    }
    return parse_clip_config(raw, str(file))
