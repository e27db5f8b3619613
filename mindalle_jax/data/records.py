"""Records as people write them: the names of their fields, the values of captions and labels, and the bytes of text.

A record is a line of a metadata file, the .json beside an image, a row of a table, or the .json in a tar.
"""

import codecs
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mindalle_jax.errors import DataError, did_you_mean

IMAGES = ("file_name", "filename", "image", "path", "file", "filepath", "jpg", "png", "webp", "jpeg")
CAPTIONS = ("text", "caption", "captions", "prompt")
LABELS = ("label", "class")
"""Names of fields, in any case. The first one that a record has counts."""


class Columns(NamedTuple):
    """Names of fields that a person chose; None takes the first known name that a record has."""

    image: str | None = None
    caption: str | None = None

    def find(self, names: Iterable[str]) -> "Found":
        """Returns the fields of a record that has these names. Raises DataError if a chosen one is not among them."""
        names = list(names)
        chosen = {"data.image_column": self.image, "data.caption_column": self.caption}
        for field, name in chosen.items():
            if name is not None and name not in names:
                near = did_you_mean(name, names)
                raise DataError(f"{field}: there is no {name!r}, only {', '.join(map(str, names))}{near}")
        return Found(
            self.image or _first(IMAGES, names), self.caption or _first(CAPTIONS, names), _first(LABELS, names)
        )


ANY_COLUMNS = Columns()
"""Takes the known names."""


class Found(NamedTuple):
    """Names of the fields with the image, the captions and the label; None for a field that is not there."""

    image: str | None
    caption: str | None
    label: str | None


def _first(known: tuple[str, ...], names: list[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(names) if isinstance(name, str)}
    return next((lower[name] for name in known if name in lower), None)


def read_record(record: Mapping[str, Any], columns: Columns) -> tuple[list[str], int | str | None]:
    """Returns the captions and the label of a record. Raises ValueError if one of them is neither text nor a number.

    Where the chosen caption column is missing in this one record, it has no caption.
    """
    names = [name for name in record if record[name] is not None]
    caption = columns.caption if columns.caption is not None else _first(CAPTIONS, names)
    label = _first(LABELS, names)
    return captions_of(record.get(caption) if caption else None), label_of(record[label] if label else None)


def captions_of(value: Any) -> list[str]:
    """Returns the captions in a field: a text, or a list of texts. Raises ValueError for anything else."""
    captions = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(captions, (list, tuple)) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("a caption is no text")
    return list(captions)


def label_of(value: Any) -> int | str | None:
    """Returns the label in a field: a number from 0, or the name of a class. Raises ValueError for anything else."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isdecimal() and len(text) < 10 else text or None
    if isinstance(value, float) and value.is_integer():  # a table with gaps has numbers such as 3.0
        value = int(value)
    if value is not None and type(value) is not int:
        raise ValueError("a label is neither a number nor a name")
    return value


def decode_text(data: bytes) -> str:
    """Returns the text of a file: UTF-8, or UTF-16 with the mark that Windows writes. Raises UnicodeDecodeError."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")
