"""A data set in memory: any sized object whose items are pairs of an image and its captions or label."""

import io
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mindalle_jax.data.records import captions_of, label_of
from mindalle_jax.data.samples import DatasetReport, DataTask, Sample, Source
from mindalle_jax.errors import DataError

NAME = "in memory"
"""Stands for the path of such a data set."""


class Pairs(Protocol):
    """A list of (image, text), or any object with a length and items, such as a data set of PyTorch."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> tuple[Any, Any]: ...


class Item(NamedTuple):
    """The image of one pair."""

    pairs: Pairs
    number: int

    def read(self) -> bytes:
        """Returns the encoded image. Raises OSError."""
        image = self.pairs[self.number][0]
        if isinstance(image, bytes):
            return image
        if isinstance(image, (str, os.PathLike)):
            return Path(os.path.expanduser(image)).read_bytes()
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()


def memory_source(
    pairs: Pairs, task: DataTask, *, num_classes: int | None = None, known_classes: list[str] | None = None
) -> Source:
    """Returns the source of a data set in memory.

    pairs: (image, captions) for the task "text", a text or a list of texts; (image, label) for "class", a number or a
    name; (image, anything) for "unconditional". An image is a PIL image, an array uint8[H, W, 3], encoded bytes, or a
    path. num_classes, known_classes: as for Source. Raises DataError for items that are no pairs, and as Source.
    """
    report = DatasetReport()
    report.layout = "pairs in memory"
    samples = []
    for number in range(len(pairs)):
        try:
            _, about = pairs[number]
            captions = captions_of(about) if task == "text" else []
            label = label_of(about) if task == "class" else None
        except (TypeError, ValueError) as error:
            raise DataError(f"item {number} of the data is no pair of an image and a text or label: {error}") from None
        samples.append(Sample(str(number), Item(pairs, number), captions=captions, label=label))
    return Source(NAME, task, samples, report, num_classes=num_classes, known_classes=known_classes)
