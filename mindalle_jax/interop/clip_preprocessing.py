"""How a CLIP model wants its images: preprocessor_config.json of Hugging Face, read and written.

The file has the settings of transformers' CLIPImageProcessor. Settings that are left out have its defaults.
"""

import math
from typing import Any

from mindalle_jax.errors import CheckpointError
from mindalle_jax.models.clip import PIXEL_MEAN, PIXEL_STD, ClipConfig, Preprocessing

FILE = "preprocessor_config.json"
RESCALE = 1 / 255
PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor")
"""The class that such a file is of, in new and in old versions of transformers. A suffix names an implementation."""
SUFFIXES = ("", "Fast", "Pil")


def openai_preprocessing(config: ClipConfig) -> Preprocessing:
    """Returns the preprocessing of OpenAI's models, for a model that says nothing of it."""
    return Preprocessing(config.vision.image_size, config.vision.image_size)


def parse_preprocessing(raw: Any, size: int, where: str) -> Preprocessing:
    """Reads the content of a preprocessor_config.json. size: pixels of the image tower's input.

    Raises CheckpointError, which begins with `where`, for settings that cannot be followed.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: is {raw!r:.60}, not a list of settings")
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type", PROCESSORS[0]))
    if kind not in [name + suffix for name in PROCESSORS for suffix in SUFFIXES]:
        raise CheckpointError(f"{where}: is of a {kind!r:.60}; only {PROCESSORS[0]} is followed")
    for name in ("do_resize", "do_rescale"):
        if raw.get(name, True) is not True:
            raise CheckpointError(f"{where}: {name} is {raw[name]!r:.60}; only true is followed")
    if raw.get("do_pad", False) not in (False, None):
        raise CheckpointError(f"{where}: do_pad is {raw['do_pad']!r:.60}; only false is followed")
    factor = raw.get("rescale_factor", RESCALE)
    if type(factor) is not float or not math.isclose(factor, RESCALE, rel_tol=1e-6):
        raise CheckpointError(f"{where}: rescale_factor is {factor!r:.60}; only 1/255 is followed")
    short_side = _short_side(raw.get("size", {"shortest_edge": 224}), size, where)
    crop = raw.get("do_center_crop", True)
    if crop is True:
        cropped = raw.get("crop_size", 224)
        edges = (cropped.get("height"), cropped.get("width")) if isinstance(cropped, dict) else (cropped, cropped)
        if edges != (size, size):
            raise CheckpointError(f"{where}: crop_size is {cropped!r:.60}, but the image tower takes {size} x {size}")
    elif crop is not False or short_side is not None:
        raise CheckpointError(
            f"{where}: do_center_crop is {crop!r:.60}; it must be true, unless size has height and width"
        )
    resample = raw.get("resample", Preprocessing.resample)
    if type(resample) is not int or not 0 <= resample <= 5:
        raise CheckpointError(f"{where}: resample is {resample!r:.60}; Pillow's filters are 0 to 5")
    normalized = raw.get("do_normalize", True)
    if type(normalized) is not bool:
        raise CheckpointError(f"{where}: do_normalize is {normalized!r:.60}; it must be true or false")
    return Preprocessing(
        size,
        short_side,
        resample=resample,
        round_down=True,
        mean=_numbers(raw, "image_mean", PIXEL_MEAN, where) if normalized else (0.0, 0.0, 0.0),
        std=_numbers(raw, "image_std", PIXEL_STD, where, above=0) if normalized else (1.0, 1.0, 1.0),
    )


def _short_side(value: Any, size: int, where: str) -> int | None:
    """Returns the length of the short side after resizing; None if images are stretched to a square of `size`."""
    if isinstance(value, dict):
        if value.get("height") == value.get("width") == size and "shortest_edge" not in value:
            return None
        if set(value) - {"shortest_edge"} or "shortest_edge" not in value:
            raise CheckpointError(
                f"{where}: size is {value!r:.80}; a shortest_edge is followed, or height and width of {size}"
            )
        value = value["shortest_edge"]
    if type(value) is not int or not size <= value <= 1 << 14:
        raise CheckpointError(f"{where}: size is {value!r:.60}; it must be from {size} to {1 << 14:,}")
    return value


def _numbers(
    raw: dict[str, Any], name: str, default: tuple[float, float, float], where: str, above: float = -math.inf
) -> tuple[float, float, float]:
    value = raw.get(name, default)
    numbers = [value] * 3 if isinstance(value, (int, float)) else value
    usable = isinstance(numbers, (list, tuple)) and len(numbers) == 3
    if not usable or not all(type(n) in (int, float) and math.isfinite(n) and n > above for n in numbers):
        raise CheckpointError(f"{where}: {name} is {value!r:.80}; it must be three numbers")
    red, green, blue = map(float, numbers)
    return red, green, blue


def dump_preprocessing(preprocessing: Preprocessing) -> dict[str, Any]:
    """Returns the content of a preprocessor_config.json, from which transformers and parse_preprocessing read it.

    The one thing that it cannot say is `round_down`: who reads it rounds down.
    """
    size, short_side = preprocessing.size, preprocessing.short_side
    return {
        "image_processor_type": PROCESSORS[0],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size} if short_side is None else {"shortest_edge": short_side},
        "resample": preprocessing.resample,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": RESCALE,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
