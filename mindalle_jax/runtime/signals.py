"""Turns Ctrl-C and SIGTERM into a request to stop, so that finished work is kept."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class StopFlag:
    """The flag that the functions below yield."""

    requested = False
    """True after a signal. The caller then finishes the step or the row of codes, saves, and stops."""


@contextlib.contextmanager
def note_interrupts() -> Iterator[StopFlag]:
    """Within the block Ctrl-C raises KeyboardInterrupt as usual, and also sets a flag.

    The flag is needed because JAX calls Python code from places where an exception is lost.
    """
    flag, before, hook = StopFlag(), signal.getsignal(signal.SIGINT) or signal.SIG_DFL, sys.unraisablehook

    def note(number: int, frame: FrameType | None) -> None:
        flag.requested = True
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            hook(lost)

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    try:
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = unraisable
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook


@contextlib.contextmanager
def stop_on_signals(told: str) -> Iterator[StopFlag]:
    """Within the block the first SIGTERM or SIGINT sets a flag. The second one acts as it would without the block.

    told: one line for stderr at the first signal, because the work may take a while to stop.
    Use it in the main thread, and after jax.distributed.initialize, whose handler of SIGTERM it replaces. Several
    processes must agree on the step after which they stop, because a signal reaches them at different steps.
    """
    flag = StopFlag()
    # getsignal is None for a handler that was not installed from Python, and cannot be put back.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        flag.requested = True
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, f"\n{told}\n".encode())  # not print: the signal may have interrupted one
        put_back()

    try:
        for number in before:
            signal.signal(number, stop)
        yield flag
    finally:
        put_back()
