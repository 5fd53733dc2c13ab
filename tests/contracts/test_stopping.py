from __future__ import annotations

import os
import signal

import pytest
from livedraft.contracts.stopping import stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_event_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stopping() as stop:
        os.kill(os.getpid(), number)
        assert stop.wait(10)
    assert signal.getsignal(number) is before


def test_a_storm_of_signals_during_a_wait_does_not_lock_up() -> None:
    with stopping() as stop:
        for _ in range(2000):
            os.kill(os.getpid(), signal.SIGTERM)
            stop.wait(0)
        assert stop.wait(10)


def test_without_a_signal_nothing_is_left_behind() -> None:
    with stopping() as stop:
        pass
    assert not stop.is_set()
