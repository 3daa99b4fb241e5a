"""What a step frees is there for the next one, and goes back when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import torch
from sdtune.hardware.allocator import pin_allocation, release

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

def freed():
    before = resident()
    torch.empty(2**24).fill_(1)  # 64 MiB, which glibc maps and gives back when they are freed
    return resident() - before

freed()
apart = freed()
pin_allocation("cuda")
on_gpu = freed()
pin_allocation("cpu")
kept = freed()
full = resident()
release()
print(apart, on_gpu, kept, full - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_is_freed_is_kept_until_it_is_released() -> None:
    said = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, timeout=120).stdout
    apart, on_gpu, kept, returned = map(int, said.split())
    assert max(apart, on_gpu) < 8, "given back at once"
    assert kept >= 60
    assert returned >= 60
