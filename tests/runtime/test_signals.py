"""A signal is a wish to stop, once."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mindalle_jax.runtime.signals import note_interrupts, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_to_stop_and_the_second_acts_as_usual(number, capfd):
    came: list[int] = []
    before = signal.signal(number, lambda n, _: came.append(n))
    try:
        with stop_on_signals("stopping") as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested and came == [] and capfd.readouterr().err == "\nstopping\n"
            os.kill(os.getpid(), number)
            assert came == [number]
        with stop_on_signals("stopping") as stop:
            pass
        os.kill(os.getpid(), number)
        assert came == [number] * 2 and not stop.requested
    finally:
        signal.signal(number, before)


def test_an_interrupt_that_gets_lost_is_noted():
    """JAX calls Python when it collects garbage, and prints and forgets what is raised there."""
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with note_interrupts() as noted:
        assert not noted.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert noted.requested

        class Lost:
            def __del__(self):
                raise KeyboardInterrupt

        Lost()  # as in a callback: Python would print a traceback, and pytest call that an error
    assert signal.getsignal(signal.SIGINT) is before and sys.unraisablehook is hook


def test_other_threads_note_nothing():
    """Handlers are the main thread's."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: note_interrupts().__enter__().requested).result() is False
