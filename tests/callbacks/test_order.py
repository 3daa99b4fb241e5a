"""Order of callbacks by priority."""

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


def test_callbacks_are_sorted_by_priority_and_ties_keep_their_order(tmp_path: Path) -> None:
    record = MetricsRecorder(tmp_path)
    checkpoints, ema = Checkpoints(tmp_path, record), EMA()
    foreign, other, early, late = LearningRateMonitor(), Callback(), Early(), Late()
    unsorted = [late, checkpoints, foreign, record, ema, other, early]
    assert by_priority(unsorted) == [early, ema, record, foreign, other, checkpoints, late]
