"""Callbacks are called by their priority."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning.callbacks import Callback, LearningRateMonitor

from sdtune.callbacks import EMA
from sdtune.callbacks.checkpoints import Checkpoints
from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.callbacks.order import by_priority


class Early(Callback):
    priority = -100


class Late(Callback):
    priority = 300


def test_by_priority_and_ties_stay_in_their_order(tmp_path: Path) -> None:
    record = MetricsRecorder(tmp_path)
    checkpoints, ema = Checkpoints(tmp_path, record), EMA()
    foreign, other, early, late = LearningRateMonitor(), Callback(), Early(), Late()
    given = [late, checkpoints, foreign, record, ema, other, early]
    assert by_priority(given) == [early, ema, record, foreign, other, checkpoints, late]
