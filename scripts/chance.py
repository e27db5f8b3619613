"""Random choices that a name determines, for data sets whose image n is always the same."""

import random
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Chance:
    """A generator named by a text. Of Python's only random() is promised to stay the same."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(name).random

    def share(self, probability: float) -> bool:
        """True in this share of the calls."""
        return self._random() < probability

    def of(self, options: Sequence[_T]) -> _T:
        """One of them, each as likely."""
        return options[int(self._random() * len(options))]
