"""Start ``sdtune`` commands on the stub GPU, each in a process of its own, and read what they cost."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gpu_stub.phase import WARM_UP, Phase

HERE = Path(__file__).parent
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """What a command cost on the stub GPU.

    Attributes:
        output: stdout and stderr.
        waiting_lines: FILE:LINE that waited for the device in two micro-batches, and how often.
        device_peaks: bytes taken from the driver of each device, without the context.
        child_peaks: the same for each process that the command has started.
    """

    code: int
    output: str
    phases: tuple[Phase, ...]
    waiting_lines: Counter[str]
    device_peaks: tuple[int, ...]
    child_peaks: tuple[tuple[int, ...], ...] = ()

    def peak(self, name: str) -> float:
        """Highest peak of the phases ``name`` that started a kernel, in GiB; 0 if there was none."""
        phases = (phase for phase in self.phases if phase.name == name and phase.counters.get("launches"))
        return max((phase.peak for phase in phases), default=0) / GIB

    def steady(self, counter: str) -> float:
        """Median of ``counter`` over the micro-batches after the warm-up."""
        batches = [phase for phase in self.phases if phase.name == "micro-batch"][WARM_UP + 2 :]
        return statistics.median(phase.counters.get(counter, 0) for phase in batches)


def run(
    build: Path, folder: Path, *arguments: str, gib: float = 80, devices: int = 1, sm: int = 90, timeout: float = 600
) -> Measured:
    """Run ``sdtune *arguments`` on ``devices`` stub GPUs of ``gib`` GiB; ``folder`` receives the report."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    for stale in (report, *folder.glob("child-*.json")):
        stale.unlink(missing_ok=True)
    environment = os.environ | {
        "GPU_STUB_BUILD": str(build),
        "GPU_STUB_GIB": str(gib),
        "GPU_STUB_DEVICES": str(devices),
        "GPU_STUB_SM": str(sm),
        "LD_LIBRARY_PATH": str(build),
        "LD_PRELOAD": str(build / "libgpustub.so"),
        "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "SDTUNE_CACHE": str(folder / "cache"),
    }
    process = subprocess.run(
        [sys.executable, str(HERE / "command.py"), str(report), *arguments],
        env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
        check=False,
    )  # fmt: skip
    result = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    return Measured(
        process.returncode,
        process.stdout,
        tuple(Phase(**phase) for phase in result.get("phases", ())),
        Counter(result.get("waiting_lines", {})),
        tuple(result.get("device_peaks", ())),
        tuple(tuple(json.loads(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("child-*.json"))),
    )
