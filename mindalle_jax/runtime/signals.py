"""Ctrl-C and SIGTERM as a wish to stop, so that what is done is kept."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class StopFlag:
    """Is yielded by the functions below."""

    requested = False
    """Whether a signal has come: then finish the step, or the row of codes, save and leave."""


@contextlib.contextmanager
def note_interrupts() -> Iterator[StopFlag]:
    """Ctrl-C raises KeyboardInterrupt as ever, and sets a flag, since JAX calls Python where an exception gets lost."""
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
    """The first SIGTERM or SIGINT in the block sets a flag; the second one acts as it would without the block.

    told: one line for stderr when the first one comes, since what stops takes its time.
    For the main thread, and after jax.distributed.initialize, whose own handler of SIGTERM it replaces. Several
    processes must agree on the step to stop at: a signal reaches them at different ones.
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
            os.write(2, f"\n{told}\n".encode())  # print may be in the middle of a line of its own
        put_back()

    try:
        for number in before:
            signal.signal(number, stop)
        yield flag
    finally:
        put_back()
