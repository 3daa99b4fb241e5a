"""Number of CPU threads and free cores."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdtune.hardware import threads


@pytest.mark.parametrize(
    ("configured", "kept", "omp_threads", "expected"),
    [
        ("auto", None, None, None),
        ("auto", None, "3", 3),
        ("auto", None, "5,2", 5),  # a list for nested parallel regions
        ("auto", 2, "3", 2),
        (4, 2, "3", 4),
    ],
)
def test_threads_come_from_config_then_earlier_start_then_environment(
    configured: int | str,
    kept: int | None,
    omp_threads: str | None,
    expected: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_threads)
    assert threads.configured_threads({"threads": configured}, kept) == expected


@pytest.mark.parametrize(
    ("cores", "quota", "busy", "expected"),
    [(8, None, 0, 8), (8, None, 3, 5), (2, None, 5, 1), (64, 4.5, 10, 4), (8, 6.0, 4, 4), (8, 0.5, 0, 1)],
)
def test_free_cores_are_within_affinity_and_quota(
    cores: int, quota: float | None, busy: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "affinity", lambda: list(range(cores)))
    monkeypatch.setattr(threads, "_quotas", lambda: {} if quota is None else {tmp_path: quota})
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    assert threads.free_cores() == expected


@pytest.mark.parametrize("version", [1, 2])
def test_usage_of_the_cgroup_is_not_free(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with two cores on a large machine; another run in it uses one core."""
    file, text = (
        (tmp_path / "cpuacct.usage", "{}000\n") if version == 1 else (tmp_path / "cpu.stat", "usage_usec {}\na 1")
    )
    monkeypatch.setattr(threads, "affinity", lambda: list(range(64)))
    monkeypatch.setattr(threads, "_quotas", lambda: {tmp_path: 2.0})
    file.write_text(text.format(5_000_000), encoding="utf-8")

    def busy() -> int:
        time.sleep(0.25)
        file.write_text(text.format(5_250_000), encoding="utf-8")
        return 20

    monkeypatch.setattr(threads, "busy_cores", busy)
    assert threads.free_cores() == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity")
def test_only_busy_cores_of_the_affinity_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = threads.psutil.Process().cpu_affinity()
    usage = [100.0] * (max(cores) + 5)
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda interval, percpu: usage)
    assert threads.busy_cores() == len(cores), "cores outside of the affinity do not count"
    usage[cores[0]] = 0.0
    assert threads.busy_cores() == len(cores) - 1


def test_busy_core_is_detected() -> None:
    before = threads.busy_cores()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            time.sleep(0.5)
            busy = [threads.busy_cores() for _ in range(3)]
        finally:
            child.kill()
    assert max(busy) > before or before == threads.usable_cores()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("cgroup", ["", "slice", "slice/run.scope"])
def test_usable_cores_are_limited_by_affinity_and_quotas(
    version: int, cgroup: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = len(threads.psutil.Process().cpu_affinity())
    own_cgroup = tmp_path / "own"
    own_cgroup.write_text(
        "0::/slice/run.scope\n" if version == 2 else "3:memory:/other\n1:cpuacct,cpu:/slice/run.scope\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(threads, "OWN_CGROUP", own_cgroup)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    assert threads.usable_cores() == cores
    folder = (tmp_path if version == 2 else tmp_path / "cpu") / cgroup
    folder.mkdir(parents=True, exist_ok=True)
    for quota, expected in (("max", cores), ("150000", 1), ("50000", 1), ("6400000", cores)):
        if version == 2:
            (folder / "cpu.max").write_text(f"{quota} 100000\n", encoding="utf-8")
        else:
            (folder / "cpu.cfs_quota_us").write_text(quota.replace("max", "-1"), encoding="utf-8")
            (folder / "cpu.cfs_period_us").write_text("100000", encoding="utf-8")
        assert threads.usable_cores() == expected


def test_previous_number_of_torch_threads_is_restored() -> None:
    previous = torch.get_num_threads()
    with threads.torch_threads(previous + 1) as count:
        assert torch.get_num_threads() == count == previous + 1
    assert torch.get_num_threads() == previous
