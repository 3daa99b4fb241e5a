"""Number of CPU threads and free cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdtune.hardware import threads
from sdtune.hardware.threads import CpuUsage


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


def usage(clock: float, own: float, cores: float, cgroups: dict[Path, float]) -> CpuUsage:
    return CpuUsage(os.getpid(), clock, own, {0: cores, 1: 0.0}, cgroups)


@pytest.mark.parametrize(
    ("cores", "quota", "busy", "expected"),
    [(8, None, 0, 8), (8, None, 3, 5), (2, None, 5, 1), (64, 4.5, 10, 4), (8, 6.0, 4, 2), (8, 0.5, 0, 1)],
)
def test_free_cores_are_within_affinity_and_quota(
    cores: int, quota: float | None, busy: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cgroup uses at most four of the busy cores, and this process has used one core since the start."""
    cgroups = {} if quota is None else {tmp_path: 50.0}
    in_cgroup = 4 if quota == 6.0 else 0
    now = usage(104.0, 14.0, 200.0 + 4 * (busy + 1), dict.fromkeys(cgroups, 50.0 + 4 * (in_cgroup + 1)))
    monkeypatch.setattr(threads, "affinity", lambda: list(range(cores)))
    monkeypatch.setattr(threads, "_quotas", lambda: {} if quota is None else {tmp_path: quota})
    monkeypatch.setattr(threads, "_AT_IMPORT", [usage(100.0, 10.0, 200.0, cgroups)])
    monkeypatch.setattr(CpuUsage, "now", lambda: now)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: pytest.fail("it sleeps"))
    assert threads.free_cores() == expected


@pytest.mark.parametrize("since_import", [0.1, 100.0])
def test_usage_is_measured_again_directly_after_the_import_and_long_after_it(
    since_import: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    at_import = usage(0.0, 0.0, 0.0, {})
    later = iter([usage(since_import, 0.0, 0.0, {}), usage(since_import + 0.25, 0.0, 0.75, {})])
    monkeypatch.setattr(threads, "affinity", lambda: list(range(8)))
    monkeypatch.setattr(threads, "_quotas", dict)
    monkeypatch.setattr(threads, "_AT_IMPORT", [at_import])
    monkeypatch.setattr(CpuUsage, "now", lambda: next(later))
    monkeypatch.setattr(threads.time, "sleep", slept.append)
    assert threads.free_cores() == 5
    assert slept == [0.25]


@pytest.mark.parametrize("version", [1, 2])
def test_usage_of_a_cgroup_is_read(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, text = ("cpuacct.usage", "5000000000\n") if version == 1 else ("cpu.stat", "usage_usec 5000000\na 1")
    (tmp_path / file).write_text(text, encoding="utf-8")
    monkeypatch.setattr(threads, "_quotas", lambda: {tmp_path: 2.0})
    assert CpuUsage.now().cgroups == {tmp_path: 5.0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity")
def test_only_cores_of_the_affinity_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = threads.psutil.Process().cpu_affinity()
    times = SimpleNamespace(user=7.0, idle=100.0, iowait=3.0)
    monkeypatch.setattr(threads.psutil, "cpu_times", lambda percpu: [times] * (max(cores) + 5))
    monkeypatch.setattr(threads, "busy_seconds", lambda times: times.user)
    assert CpuUsage.now().cores == dict.fromkeys(cores, 7.0)


@pytest.mark.parametrize("measured", [[], [CpuUsage(0, 100.0, 0.0, {}, {})]], ids=["second call", "forked process"])
def test_usage_at_the_import_is_used_once_and_only_by_its_process(
    measured: list[CpuUsage], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = iter([usage(104.0, 1.0, 1.0, {}), usage(104.25, 1.0, 1.5, {})])
    monkeypatch.setattr(threads, "affinity", lambda: list(range(8)))
    monkeypatch.setattr(threads, "_quotas", dict)
    monkeypatch.setattr(threads, "_AT_IMPORT", measured)
    monkeypatch.setattr(CpuUsage, "now", lambda: next(later))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    assert threads.free_cores() == 6
    assert threads._AT_IMPORT == []


def test_core_used_by_another_process_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def free_after(seconds: float) -> int:
        monkeypatch.setattr(threads, "_AT_IMPORT", [CpuUsage.now()])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:  # this process uses a core
            pass
        return threads.free_cores()

    before = max(free_after(0.5) for _ in range(3))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            time.sleep(0.5)
            free = [free_after(0.5) for _ in range(3)]
        finally:
            child.kill()
    assert min(free) < before or before == 1


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
