"""Freed CPU memory is kept for the next step and returned to the system on release."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import torch
from sdtune.hardware.allocator import pin_allocation, release

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

def growth():
    before = resident()
    torch.empty(2**24).fill_(1)  # 64 MiB, which glibc by default returns to the system when freed
    return resident() - before

growth()
default = growth()
pin_allocation("cuda")
on_gpu = growth()
pin_allocation("cpu")
pinned = growth()
before_release = resident()
release()
print(default, on_gpu, pinned, before_release - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_kept_until_release() -> None:
    output = subprocess.run(
        [sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    default, on_gpu, pinned, returned = map(int, output.split())
    assert max(default, on_gpu) < 8, "returned to the system immediately"
    assert pinned >= 60
    assert returned >= 60
