"""How many threads torch computes with."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdtune.hardware import threads


def test_omp_num_threads_is_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.auto_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")  # OpenMP's form for nested regions
    assert threads.auto_threads(8) == 5


@pytest.mark.parametrize(("usable", "busy", "processes", "wanted"), [(8, 0, 1, 8), (8, 3, 1, 5), (8, 3, 2, 2),
                                                                     (2, 2, 1, 1), (2, 5, 4, 1)])  # fmt: skip
def test_auto_takes_the_free_cores(
    usable: int, busy: int, processes: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: usable)
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    assert threads.auto_threads(processes) == wanted


def test_a_busy_core_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            time.sleep(0.5)
            assert 1 <= threads.busy_cores() <= threads.usable_cores()
        finally:
            child.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity")
def test_affinity_and_quota_bound_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = len(threads.psutil.Process().cpu_affinity())
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    assert threads.usable_cores() == own
    for text, wanted in (("max 100000", own), ("150000 100000", 1), ("50000 100000", 1), ("6400000 100000", own)):
        (tmp_path / "cpu.max").write_text(text)
        assert threads.usable_cores() == wanted
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert threads.usable_cores() == 1


def test_torchs_own_number_comes_back() -> None:
    before = torch.get_num_threads()
    with threads.torch_threads(before + 1) as count:
        assert torch.get_num_threads() == count == before + 1
    assert torch.get_num_threads() == before
