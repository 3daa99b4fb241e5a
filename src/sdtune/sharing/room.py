"""How many runs a device holds at once, by what ``sdtune plan`` counts of one."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from sdtune import hardware, plan_run
from sdtune.planning.memory import ALLOWANCE


def room(jobs: Sequence[plan_run.Job], devices: int = 1) -> int:
    """At least 1; ``jobs`` may share a backbone, and so many ``devices`` are in use."""
    # The widest job stands for all.
    job = max(jobs, key=lambda job: int(job.config["method"].get("rank", 0)))
    figures = plan_run.figures(job)
    cost = figures.checkpointed if job.config["hardware"].get("gradient_checkpointing") else figures.plain
    own = figures.gradients + figures.state + figures.average + max(cost.together, figures.gradients)
    free = _memory(str(job.config["hardware"].get("accelerator", "auto")), devices) - ALLOWANCE - figures.total.bytes
    return max(1, min(len(jobs), free // own))


def _memory(kind: str, devices: int) -> int:
    """Bytes of a device, or its share of those that a CPU's machine has free."""
    if hardware.accelerator(kind) in ("gpu", "cuda"):
        return torch.cuda.get_device_properties(0).total_memory
    return int(psutil.virtual_memory().available) // devices
