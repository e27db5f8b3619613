"""A signal is a wish to stop, once."""

import os
import signal

import pytest

from mindalle_jax.runtime.signals import stop_on_signals


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
