"""PNG files that say how their image was made: prompt, seed, candidate, codes, settings and the digest of the model.

They stand in text chunks: `Description` is the prompt, `Software` this program, and KEY a JSON object with all.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mindalle_jax
from mindalle_jax.errors import UsageError

KEY = "mindalle-jax"


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """What a PNG file says of its image."""

    prompt: str
    seed: int
    candidate: int
    codes: np.ndarray
    """int32[h * w]"""
    score: float | None
    settings: dict[str, Any]
    """As Generation.meta: options, model and its digest, device, versions."""


def write_image(path: Path, image: np.ndarray, record: ImageRecord) -> None:
    """Writes uint8[H, W, 3] as PNG. Raises OSError."""
    chunks = PngInfo()
    chunks.add_itxt("Description", record.prompt)
    chunks.add_text("Software", f"mindalle-jax {mindalle_jax.__version__}")
    tree = dataclasses.asdict(record) | {"codes": record.codes.tolist()}
    chunks.add_text(KEY, json.dumps(tree), zip=True)  # ASCII, which the chunk allows
    Image.fromarray(image).save(path, format="PNG", pnginfo=chunks)


def read_image_record(path: Path) -> ImageRecord:
    """The record of an image that Generation.save wrote. Raises UsageError for another file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # chunks may come after the pixels
            text = image.info.get(KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot be read as PNG: {error}") from None
    if not isinstance(text, str):
        raise UsageError(
            f"{path}: does not say how it was made; only PNG files that mindalle wrote do, as long as no other program "
            "has written them again (an image of any origin is completed with --image)"
        )
    try:
        return _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path}: its record is damaged: {type(error).__name__}: {str(error)[:100]}") from None


def _parse(tree: Any) -> ImageRecord:
    """Anybody may have written the file: types are checked, and what they hold is checked where it is used."""
    record = ImageRecord(**tree | {"codes": np.asarray(tree["codes"])})
    whole = record.codes.ndim == 1 and record.codes.dtype.kind == "i" and record.codes.size > 0
    numbers = type(record.seed) is int and type(record.candidate) is int
    if not whole or not numbers or not isinstance(record.prompt, str) or not isinstance(record.settings, dict):
        raise ValueError("prompt, seed, candidate, codes and settings are wanted")
    if not 0 <= record.seed < 2**32 or not 0 <= record.candidate < 2**31:
        raise ValueError("seed or candidate is out of range")
    if record.score is not None and not isinstance(record.score, (int, float)):
        raise ValueError("the score must be a number")
    return dataclasses.replace(record, codes=record.codes.astype(np.int32))
