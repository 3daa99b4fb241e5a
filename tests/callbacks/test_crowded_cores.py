"""Warning if other programs take CPU time from a training on the CPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdtune.callbacks import crowded_cores
from sdtune.callbacks.crowded_cores import CpuSeconds, CrowdedCores

TRAINER: Any = SimpleNamespace(world_size=1)
MODULE: Any = SimpleNamespace(device=torch.device("cpu"))


def warnings(
    used: tuple[float, float, float],
    cores: int,
    threads: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    quota: int = 0,
) -> list[str]:
    """Warnings logged in twelve seconds; ``used``: cores used by the run, by its workers, and by all programs."""
    run, workers, all_programs = used
    clock = iter(range(0, 1000, 4))

    def now() -> CpuSeconds:
        t = float(next(clock))
        return CpuSeconds(t, run * t, workers * t, all_programs * t)

    monkeypatch.setattr(crowded_cores.CpuSeconds, "now", now)
    monkeypatch.setattr(crowded_cores, "affinity", lambda: list(range(cores)))
    monkeypatch.setattr(crowded_cores, "usable_cores", lambda: quota or cores)
    monkeypatch.setattr(crowded_cores.time, "perf_counter", lambda: 1000.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    callback = CrowdedCores(folder)
    callback.on_train_start(TRAINER, MODULE)
    for step in range(3):
        callback.on_train_batch_end(TRAINER, MODULE, None, None, step)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("used", "cores", "threads", "advice"),
    [
        ((1.0, 0.0, 2.0), 2, 2, 1),
        ((9.0, 0.0, 16.0), 16, 16, 9),
        ((2.0, 0.0, 2.0), 2, 2, None),  # no other programs
        ((1.0, 0.9, 2.0), 2, 2, None),  # the run's own data workers
        ((1.0, 0.0, 1.2), 2, 2, None),  # the run waits for its data
        ((1.0, 0.0, 2.0), 2, 1, None),  # a single thread does not wait for others
    ],
)
def test_warning_appears_only_if_other_programs_use_the_cores(
    used: tuple[float, float, float],
    cores: int,
    threads: int,
    advice: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    messages = warnings(used, cores, threads, tmp_path, monkeypatch, caplog)
    assert len(messages) == (0 if advice is None else 1)
    assert all(line.endswith(f"sdtune train resume={tmp_path} hardware.threads={advice}") for line in messages)


def test_run_under_a_cpu_quota_gets_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings((1.0, 0.0, 2.0), 2, 2, tmp_path, monkeypatch, caplog, quota=1) == []


def test_warning_in_a_sweep_names_the_command_that_resumes_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "multirun.yaml").touch()
    [line] = warnings((1.0, 0.0, 2.0), 2, 2, tmp_path / "0", monkeypatch, caplog)
    assert line.endswith(f"sdtune train -m resume={tmp_path} hardware.threads=1")


def test_cpu_time_of_process_children_and_others_is_separated() -> None:
    start = CpuSeconds.now()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            time.sleep(1.5)
            load = CpuSeconds.now().since(start)
        finally:
            child.kill()
    assert load.run < 0.5
    assert load.all > 0.3
    assert load.others < load.all - 0.2, "the child does not count as another process"
