"""Several processes agree on a stop after log steps and about every ten seconds, and not before each micro-batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from method_cases import Case
from running import fit
from sdtune.callbacks import Checkpoints
from sdtune.callbacks.checkpoints import Agreement
from sdtune.callbacks.metrics_recorder import MetricsRecorder


class Processes:
    """Two processes; the other one takes ``slow`` times as long for a step, and requests a stop at step ``stop``."""

    def __init__(self, slow: float, stop: int) -> None:
        self.slow, self.stop, self.root_device = slow, stop, torch.device("cpu")
        self.step, self.agreements = 0, []

    def reduce(self, values: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        self.agreements.append(self.step)
        requested, seconds = values.tolist()
        return torch.tensor([max(requested, float(self.step >= self.stop)), seconds * self.slow])


@pytest.mark.parametrize(
    ("seconds", "slow", "expected"),
    [
        (1.0, 1.0, [1, 11, 21, 31, 40, 50]),  # ten seconds after the last one, and log steps
        (1.0, 5.0, [1, 3, 5, 7, 9, 11]),
        (30.0, 1.0, [1, 2, 3, 4]),  # each step takes longer than ten seconds
    ],
)
def test_agreements_come_about_every_ten_seconds(
    seconds: float, slow: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(slow, stop=expected[-1])
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    agreement = Agreement()
    for step in range(1, 100):
        now += seconds
        processes.step = step
        trainer: Any = SimpleNamespace(global_step=step, log_every_n_steps=40, strategy=processes)
        if agreement.is_stop_requested(trainer, False):
            break
    assert processes.agreements == expected


def test_training_turns_off_the_agreement_before_each_micro_batch(
    tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *arguments, **named: called.append(arguments))
    case, checkpoints = Case("lora"), Checkpoints(tmp_path / "checkpoints", MetricsRecorder(tmp_path))
    loop = fit(case.model(tiny), case.data(tiny, images), 1, [checkpoints]).fit_loop.epoch_loop
    type(loop)._broadcast_sigterm_tensor(loop)
    assert len(called) == 1
    loop._broadcast_sigterm_tensor()
    assert len(called) == 1
