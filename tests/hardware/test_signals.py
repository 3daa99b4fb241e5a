"""Signal handlers for a while."""

from __future__ import annotations

import os
import signal

import pytest

from sdtune.hardware.signals import STOP_SIGNALS, handled


def test_a_handler_hears_within_and_gives_back_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    heard: list[int] = []
    with handled(STOP_SIGNALS, lambda number, _: heard.append(number)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGTERM, signal.SIGINT]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_handler_is_given_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), handled([signal.SIGTERM], lambda *_: None):
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before
