"""Hides the logs of some libraries while a verb runs, unless --verbose is given."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

QUIET = ("absl", "orbax", "grain", "tensorstore", "asyncio", "datasets", "huggingface_hub")
"""Loggers that are hidden. The errors of these libraries reach us as exceptions, and each becomes one message. Orbax
and Grain log as absl. On a full disk they logged 340 lines of tracebacks beside that message."""
LOOP_CLOSED = "Event loop is closed"
"""The message of a RuntimeError that Python prints when a write of TensorStore fails after Orbax has stopped waiting
for it."""


class _Format(logging.Formatter):
    """Formats a record as `warning: message`, like the warnings of `mindalle`, with any traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


@contextlib.contextmanager
def quiet_libraries(verbose: bool) -> Iterator[None]:
    """Sends logs to standard error in one format within the block, and drops the logs of the QUIET libraries.

    verbose: shows the logs of all libraries, from level INFO. The end of the block restores the previous settings.
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
