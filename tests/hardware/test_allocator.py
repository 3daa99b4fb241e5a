"""What a step frees is there for the next one, and goes back when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from sdtune.hardware.allocator import pin_allocation, release

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(2**24).fill_(1)  # 64 MiB, which glibc maps and gives back each time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

faults()
apart = faults()
pin_allocation("cuda")
apart = min(apart, faults())
pin_allocation("cpu")
for _ in range(4):
    faults()
kept, full = faults(), resident()
release()
print(apart, kept, full - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_is_freed_is_kept_until_it_is_released() -> None:
    said = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, timeout=120).stdout
    apart, kept, returned = map(int, said.split())
    assert kept < apart / 10
    assert returned >= 60
