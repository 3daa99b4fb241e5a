"""Temporary signal handlers."""

from __future__ import annotations

import os
import signal

import pytest

from sdtune.hardware.signals import STOP_SIGNALS, _stop_signals, handled


def test_handler_receives_signals_and_previous_handlers_are_restored() -> None:
    previous = [signal.getsignal(number) for number in STOP_SIGNALS]
    received: list[int] = []
    with handled(STOP_SIGNALS, lambda number, _: received.append(number)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == previous


def test_previous_handler_is_restored_after_an_error() -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), handled([signal.SIGTERM], lambda *_: None):
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == previous


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_signal_that_is_ignored_at_the_start_stays_ignored(ignored: signal.Signals) -> None:
    previous = signal.signal(ignored, signal.SIG_IGN)
    try:
        assert set(_stop_signals()) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} - {ignored}
    finally:
        signal.signal(ignored, previous)
