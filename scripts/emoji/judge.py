"""Reads an image of emoji/dataset.py back: it finds the nearest of all things in all styles. It learns nothing.

Images are compared at half their size, so that the blur of a small network and a shift of a pixel are forgiven.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mindalle_jax.errors import UsageError
from scripts.emoji.dataset import GROUNDS, Example, blank_card, render
from scripts.emoji.things import MARGIN, SIDE, STYLES, Things

MAX_GROUND_ERROR = 40.0
"""Largest accepted distance in RGB of the margin from a ground: the median over its pixels."""
MAX_ERROR = 0.5
"""Largest accepted error: the squared difference from the nearest thing, divided by that of a blank card."""
BATCH = 256


class Seen(NamedTuple):
    """The content of an image, as the judge reads it. None: the image is like no thing, style or ground."""

    thing: int | None
    style: str | None
    ground: str | None
    error: float
    """As MAX_ERROR."""


class Judge:
    """Compares images with all things in all styles, on the ground that an image has."""

    def __init__(self, things: Things) -> None:
        self._things = things

    def read(self, images: np.ndarray) -> list[Seen]:
        """Reads each of the images uint8[n, SIDE, SIDE, 3]. Raises UsageError for other arrays."""
        if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
            raise UsageError(f"images must be uint8[n, {SIDE}, {SIDE}, 3], not {images.dtype}{list(images.shape)}")
        grounds, colors = list(GROUNDS), np.array(list(GROUNDS.values()), np.float32)
        margin = np.ones((SIDE, SIDE), bool)
        margin[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
        around = np.median(images[:, margin].astype(np.float32), axis=1)  # [n, 3]
        distances = np.linalg.norm(around[:, None] - colors, axis=2)
        found: list[Seen | None] = [None] * len(images)
        for number, ground in enumerate(grounds):
            mine = np.flatnonzero(distances.argmin(1) == number)
            for some in (mine[first : first + BATCH] for first in range(0, len(mine), BATCH)):
                best, errors = self._nearest(images[some], ground)
                for image, template, error in zip(some, best, errors, strict=True):
                    known = ground if distances[image, number] <= MAX_GROUND_ERROR else None
                    found[image] = self._seen(int(template), float(error), known)
        return [seen for seen in found if seen is not None]

    def _nearest(self, images: np.ndarray, ground: str) -> tuple[np.ndarray, np.ndarray]:
        """int[n] the nearest template of each image, f32[n] its error, see MAX_ERROR."""
        templates = self._templates(ground)
        flat = _halved(images) - _halved(blank_card(ground)[None])
        squares = (templates**2).sum(1)
        errors = (flat**2).sum(1)[:, None] - 2 * flat @ templates.T + squares
        best = errors.argmin(1)
        return best, np.maximum(errors.min(1), 0) / squares[best]

    @functools.lru_cache(maxsize=len(GROUNDS))  # noqa: B019  one per ground, and a judge lives as long as the program
    def _templates(self, ground: str) -> np.ndarray:
        """f32[things * styles, pixels]: the differences from a blank card."""
        shown = (
            render(self._things, Example(thing, style, ground))
            for thing in range(len(self._things.things))
            for style in STYLES
        )
        return np.concatenate([_halved(image[None]) for image in shown]) - _halved(blank_card(ground)[None])

    def _seen(self, template: int, error: float, ground: str | None) -> Seen:
        if error > MAX_ERROR:
            return Seen(None, None, ground, error)
        thing, style = divmod(template, len(STYLES))
        return Seen(thing, STYLES[style], ground, error)


def _halved(images: np.ndarray) -> np.ndarray:
    """f32[n, pixels] in [0, 1]: means of two by two pixels of uint8[n, SIDE, SIDE, 3]."""
    half = SIDE // 2
    return (
        images.reshape(len(images), half, 2, half, 2, 3).mean((2, 4), dtype=np.float32).reshape(len(images), -1) / 255
    )


def accuracy(seen: Iterable[Seen], asked: Iterable[Example]) -> dict[str, float]:
    """Share of images, in [0, 1], that show the thing, the style, both, and the ground that was asked for."""
    rows = [
        (one.thing == example.thing, one.style == example.style, one.ground == example.ground)
        for one, example in zip(seen, asked, strict=True)
    ]
    thing, style, ground = np.array(rows).T
    named = {"thing": thing, "style": style, "thing and style": thing & style, "ground": ground}
    return {name: round(float(values.mean()), 4) for name, values in named.items()}
