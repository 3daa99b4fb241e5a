"""How many threads torch computes with."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdtune.hardware import threads


@pytest.mark.parametrize(
    ("asked", "kept", "named", "expected"),
    [
        ("auto", None, None, None),
        ("auto", None, "3", 3),
        ("auto", None, "5,2", 5),  # OpenMP's form for nested regions
        ("auto", 2, "3", 2),
        (4, 2, "3", 4),
    ],
)
def test_what_settles_the_number(
    asked: int | str, kept: int | None, named: str | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    assert threads.given_threads({"threads": asked}, kept) == expected


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
def test_what_the_cgroup_uses_is_not_free(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of two cores on a large machine, in which another run uses one of them."""
    file, text = (
        (tmp_path / "cpuacct.usage", "{}000\n") if version == 1 else (tmp_path / "cpu.stat", "usage_usec {}\na 1")
    )
    monkeypatch.setattr(threads, "affinity", lambda: list(range(64)))
    monkeypatch.setattr(threads, "_quotas", lambda: {tmp_path: 2.0})
    file.write_text(text.format(5_000_000))

    def busy() -> int:
        time.sleep(0.25)
        file.write_text(text.format(5_250_000))
        return 20

    monkeypatch.setattr(threads, "busy_cores", busy)
    assert threads.free_cores() == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity")
def test_busy_cores_of_the_affinity_count(monkeypatch: pytest.MonkeyPatch) -> None:
    own = threads.psutil.Process().cpu_affinity()
    usage = [100.0] * (max(own) + 5)
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda interval, percpu: usage)
    assert threads.busy_cores() == len(own), "those outside do not"
    usage[own[0]] = 0.0
    assert threads.busy_cores() == len(own) - 1


def test_a_busy_core_is_seen() -> None:
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
@pytest.mark.parametrize("place", ["", "slice", "slice/run.scope"])
def test_affinity_and_quotas_bound_the_cores(
    version: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = len(threads.psutil.Process().cpu_affinity())
    kept = tmp_path / "own"
    kept.write_text("0::/slice/run.scope\n" if version == 2 else "3:memory:/other\n1:cpuacct,cpu:/slice/run.scope\n")
    monkeypatch.setattr(threads, "OWN_CGROUP", kept)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    assert threads.usable_cores() == own
    folder = (tmp_path if version == 2 else tmp_path / "cpu") / place
    folder.mkdir(parents=True, exist_ok=True)
    for granted, expected in (("max", own), ("150000", 1), ("50000", 1), ("6400000", own)):
        if version == 2:
            (folder / "cpu.max").write_text(f"{granted} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(granted.replace("max", "-1"))
            (folder / "cpu.cfs_period_us").write_text("100000")
        assert threads.usable_cores() == expected


def test_torchs_own_number_comes_back() -> None:
    before = torch.get_num_threads()
    with threads.torch_threads(before + 1) as count:
        assert torch.get_num_threads() == count == before + 1
    assert torch.get_num_threads() == before
