"""PNG files that record how their image was made: prompt, seed, candidate, codes, settings and digest of the model.

The record is in text chunks of the file: `Description` is the prompt, `Software` is the name and version of this
program, and KEY is a JSON object with the complete record.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mindalle_jax
from mindalle_jax.errors import UsageError, one_line

KEY = "mindalle-jax"
MAX_BYTES = 16 << 20
"""Size limit of a file that is read. Images of 256 x 256 pixels have less than 1 MB."""


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """The record of an image in its PNG file."""

    prompt: str
    seed: int
    candidate: int
    codes: np.ndarray
    """int32[h * w]"""
    score: float | None
    settings: dict[str, Any]
    """The content of Generation.meta: options, model and its digest, device, versions."""


def write_image(path: Path, image: np.ndarray, record: ImageRecord) -> None:
    """Writes an image uint8[H, W, 3] as PNG, with its record. Raises OSError if the file cannot be written."""
    chunks = PngInfo()
    chunks.add_itxt("Description", record.prompt)
    chunks.add_text("Software", f"mindalle-jax {mindalle_jax.__version__}")
    tree = dataclasses.asdict(record) | {"codes": record.codes.tolist()}
    chunks.add_text(KEY, json.dumps(tree), zip=True)  # ASCII, which the chunk allows
    Image.fromarray(image).save(path, format="PNG", pnginfo=chunks)


def read_image_record(path: Path) -> ImageRecord:
    """Returns the record of an image that Generation.save wrote. Raises UsageError for any other file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MB")
        with Image.open(path, formats=["PNG"]) as image:  # reads only the chunks before the pixels
            text = image.info.get(KEY)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Exception as error:  # Pillow passes on whatever its decoders raise
        raise UsageError(f"{path}: cannot be read as PNG: {one_line(error)}") from None
    if not isinstance(text, str):
        raise UsageError(
            f"{path}: has no record of how it was made; images that mindalle wrote have one (not the sheet grid.png), "
            "until another program saves them again"
        )
    try:
        return _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path}: its record is damaged: {type(error).__name__}: {ascii(str(error))[:100]}") from None


def _parse(tree: Any) -> ImageRecord:
    """Checks the types of a record, since anybody may have written the file. Values are checked where they are used."""
    json.dumps(tree, ensure_ascii=False).encode()  # a lone surrogate is a ValueError
    record = ImageRecord(**tree | {"codes": np.asarray(tree["codes"])})
    whole = record.codes.ndim == 1 and record.codes.dtype.kind == "i" and record.codes.size > 0
    numbers = type(record.seed) is int and type(record.candidate) is int
    if not whole or not numbers or not isinstance(record.prompt, str) or not isinstance(record.settings, dict):
        raise ValueError("prompt, seed, candidate, codes or settings are missing or have the wrong type")
    if not 0 <= record.seed < 2**32 or not 0 <= record.candidate < 2**31:
        raise ValueError("seed or candidate is out of range")
    if record.codes.min() < 0 or record.codes.max() >= 2**31:
        raise ValueError("a code is out of range")
    score = None if record.score is None else float(record.score)
    if score is not None and not math.isfinite(score):
        raise ValueError("the score must be finite")
    return dataclasses.replace(record, codes=record.codes.astype(np.int32), score=score)
