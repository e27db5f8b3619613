"""Makes random choices that a name determines, for data sets whose image n is always the same."""

import random
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Chance:
    """A random generator whose seed is a text. It uses only random(), which Python promises not to change."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(name).random

    def share(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def of(self, options: Sequence[_T]) -> _T:
        """One of the options, each with the same probability."""
        return options[int(self._random() * len(options))]
