"""Run one ``sdtune`` command on the stub GPU and write what it cost to a JSON file.

    python command.py REPORT.json train experiment=lora_subject hardware=gpu ...

The environment comes from :func:`gpu_stub.run.run`.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch

from experiments.gpu.waits import WaitingLines
from gpu_stub.counters import counters, device_peak, install, reset
from gpu_stub.phase import WARM_UP, Phase


class Meter:
    """Measures calls; a phase inside another one also counts for the outer one."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._open: list[Phase] = []

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self._read()
            phase = Phase(name, torch.cuda.memory_allocated())
            self._open.append(phase)
            reset()
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                phase.seconds = time.perf_counter() - start
                phase.counters = {key: count for key, count in counters().items() if count}
                self._read()
                phase.after = torch.cuda.memory_allocated()
                self._open.pop()
                self.phases.append(phase)

        return call

    def _read(self) -> None:
        """Add the peak since the last call to all open phases."""
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        for phase in self._open:
            phase.peak, phase.reserved = max(phase.peak, peak), max(phase.reserved, reserved)
        torch.cuda.reset_peak_memory_stats()

    def measure(self, name: str, owner: Any, attribute: str) -> None:
        setattr(owner, attribute, self.measured(name, getattr(owner, attribute)))


def _measure(meter: Meter, waits: WaitingLines) -> None:
    """Put the meter around the phases of a run."""
    from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

    from sdtune.callbacks.samples import Samples
    from sdtune.commands import sample
    from sdtune.data.datamodule import ImageDataModule
    from sdtune.evaluation import ClipMetrics, subject_metrics
    from sdtune.evaluation.clip import Clip
    from sdtune.evaluation.dino import Dino
    from sdtune.methods.base import Adapter
    from sdtune.sampling.run_models import RunModels

    for name, owner, attribute in (
        ("class images", ImageDataModule, "generate_class_images"),
        ("caches", ImageDataModule, "prepare"),
        ("previews", Samples, "draw"),
        ("validation", Adapter, "validation_step"),
        ("base images", RunModels, "base_images"),
        ("trained images", RunModels, "trained_images"),
        ("strengths", subject_metrics, "strength_grid"),
        ("CLIP", Clip, "images"),
        ("DINO", Dino, "images"),
        ("evaluation", ClipMetrics, "run"),
        ("sample", sample, "execute"),
    ):
        meter.measure(name, owner, attribute)
    advance = meter.measured("micro-batch", _TrainingEpochLoop.advance)
    number = iter(range(sys.maxsize))

    def watched(*arguments: Any, **named: Any) -> Any:
        is_watched = next(number) in (WARM_UP, WARM_UP + 1)
        if is_watched:
            waits.start()
        try:
            return advance(*arguments, **named)
        finally:
            if is_watched:
                waits.stop()

    _TrainingEpochLoop.advance = watched  # type: ignore[method-assign]


def device_peaks() -> list[int]:
    return [device_peak(device) for device in range(torch.cuda.device_count())]


def _measure_child() -> None:
    """In a process of a sweep, which imports this file again: write its peaks beside the report when it ends."""
    os.environ.pop("PYTORCH_ALLOC_CONF", None)  # the stub has no expandable segments
    torch.cuda.init()
    install()
    report = Path(os.environ["GPU_STUB_REPORT"])
    target = report.with_name(f"child-{multiprocessing.current_process().name}.json")
    Finalize(None, lambda: target.write_text(json.dumps(device_peaks()), encoding="utf-8"), exitpriority=0)


def main() -> None:
    report, *arguments = sys.argv[1:]
    os.environ["GPU_STUB_REPORT"] = report
    install()
    meter, waits, code = Meter(), WaitingLines(), 0
    torch.cuda.init()
    _measure(meter, waits)
    from sdtune.cli.main import main as command

    sys.argv = ["sdtune", *arguments]
    try:
        command()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        gc.collect()
        result = {
            "code": code,
            "phases": [asdict(phase) for phase in meter.phases],
            "waiting_lines": dict(waits.lines),
            "device_peaks": device_peaks(),
        }
        Path(report).write_text(json.dumps(result, indent=1), encoding="utf-8")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    _measure_child()
