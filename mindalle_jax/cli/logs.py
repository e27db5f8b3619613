"""What the libraries below us log while a verb runs: nothing that we say ourselves, unless --verbose asks for it."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

QUIET = ("absl", "orbax", "grain", "tensorstore", "asyncio")
"""Loggers of libraries whose errors reach us as exceptions, each of which becomes one message. Orbax and Grain log as
absl. On a full disk they wrote 340 lines of tracebacks beside that message."""
LOOP_CLOSED = "Event loop is closed"
"""TensorStore has Python print this traceback when a write that failed ends after Orbax has given up on it."""


class _Format(logging.Formatter):
    """`warning: message`, as the warnings of `mindalle` look; tracebacks below it, where there are some."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


@contextlib.contextmanager
def quiet_libraries(verbose: bool) -> Iterator[None]:
    """Within the block, logs go to standard error in one format, and those of QUIET libraries nowhere.

    verbose: everything is shown, from level INFO. What was set before is set again afterwards.
    """
    root = logging.getLogger()
    handler, level, hook = logging.StreamHandler(sys.stderr), root.level, sys.excepthook
    handler.setFormatter(_Format())
    if not verbose:
        handler.addFilter(lambda record: record.name.partition(".")[0] not in QUIET)

    def excepthook(kind: Any, error: BaseException, traceback: Any) -> None:
        of_a_library = issubclass(kind, RuntimeError) and str(error) == LOOP_CLOSED
        if verbose or not of_a_library:
            hook(kind, error, traceback)

    root.addHandler(handler)
    if verbose:
        root.setLevel(min(level, logging.INFO))
    sys.excepthook = excepthook
    try:
        yield
    finally:
        sys.excepthook = hook
        root.setLevel(level)
        root.removeHandler(handler)
