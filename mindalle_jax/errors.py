"""Every error that a person can cause. Each kind has its own exit code; docs/cli.md has the table."""

import difflib
import shlex
import sys
import warnings
from collections.abc import Iterable


class MindalleError(Exception):
    """The base of all errors. The message is one line that names the offending value and what would work."""

    exit_code = 1


class UsageError(MindalleError, ValueError):
    """An argument out of range: a prompt, a seed, top_k, an image of the wrong size. Or a package is missing."""

    exit_code = 2


class ConfigError(MindalleError, ValueError):
    """config.yaml or an override names an unknown field, has the wrong type, or contradicts itself."""

    exit_code = 3


class CheckpointError(MindalleError, ValueError):
    """A weights file is missing, damaged, hostile, or does not fit the model."""

    exit_code = 4


class DownloadError(MindalleError, OSError):
    """A download failed, is incomplete, or does not have the expected checksum."""

    exit_code = 5


class OutputError(MindalleError, OSError):
    """The place to write to exists already, cannot be written, or has too little free space."""

    exit_code = 6


class NonFiniteError(MindalleError, ArithmeticError):
    """A network produced NaN or infinite numbers: in sampling, ranking or training."""

    exit_code = 7


class DeviceMemoryError(MindalleError, MemoryError):
    """The weights, a batch of candidates, or a training step do not fit into the memory of the device."""

    exit_code = 8


class DataError(MindalleError, ValueError):
    """A data set is missing, empty, damaged, in an unknown format, or does not hold what the task needs."""

    exit_code = 9


def printable(text: str) -> str:
    """Returns the text without control characters, which are commands to a terminal; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def one_line(error: BaseException) -> str:
    """Returns an error in one line; errors of libraries have many."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns the end of a message, "; did you mean NAME?", for a near name or one with this beginning; else ""."""
    lower = {other.lower(): other for other in names}
    near = [other for other in lower if len(name) > 3 and other.startswith(name.lower())]
    near += difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]}?" if near else ""


def install_hint(extra: str) -> str:
    """Returns the command that installs the packages of an extra, for people who have this package."""
    from importlib import metadata  # a tenth of the time that `mindalle --help` takes

    try:
        required = metadata.requires("mindalle-jax") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        required = []
    names = [line.partition(";")[0].strip() for line in required if f'extra == "{extra}"' in line]
    return f"pip install {' '.join(map(shlex.quote, names or [f'mindalle-jax[{extra}]']))}"


def warn(message: str) -> None:
    """Warns (UserWarning) at the line outside this package that led here: the line that the user can change."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
