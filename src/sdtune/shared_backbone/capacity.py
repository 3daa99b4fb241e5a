"""How many runs fit on a device at the same time, from the costs that ``sdtune plan`` computes."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from sdtune.data.batch_sizes import class_image_batch_size
from sdtune.hardware.precision import HALVES
from sdtune.planning.memory import ALLOWANCE
from sdtune.planning.request import PlanRequest, count

_WORKSPACE = 32 * 2**20
"""Bytes of the cuBLAS workspace per thread, and so per run: torch's default on Hopper, the largest of its defaults."""


def runs_that_fit(requests: Sequence[PlanRequest], jobs: int, device: torch.device, devices: int = 1) -> int:
    """Number of runs that fit on ``device`` at the same time, from 1 to ``jobs``.

    Args:
        requests: largest costs of the runs, one request per optimizer.
        jobs: number of runs.
        device: training device.
        devices: number of devices in use.
    """
    permanent, step, previews, base = _largest_costs(requests, device)
    free = free_memory(device, devices) - ALLOWANCE - base
    fitting: int = min(jobs, free // (permanent + step), (free - previews) // max(1, permanent))
    return max(1, fitting)


def processes_that_fit(requests: Sequence[PlanRequest], most: int, device: torch.device) -> int:
    """Number of processes, from 1 to ``most``, whose backbones and one run each fit into the memory of ``device``."""
    permanent, step, previews, base = _largest_costs(requests, device)
    fitting: int = free_memory(device, 1) // (ALLOWANCE + base + permanent + max(step, previews))
    return max(1, min(most, fitting))


def _largest_costs(requests: Sequence[PlanRequest], device: torch.device) -> list[int]:
    """Maximum of each value of :func:`run_costs` over ``requests``."""
    return [max(values) for values in zip(*(run_costs(request, device) for request in requests), strict=True)]


def run_costs(request: PlanRequest, device: torch.device) -> tuple[int, int, int, int]:
    """Bytes of a run: permanent memory, additional memory of a step, memory of previews, memory shared by all runs."""
    # Images of several runs are generated in passes of this size, while the permanent memory of all runs stays in use.
    costs = count(request, previews=max(request.previews or 1, class_image_batch_size(request.side)))
    cost = costs.checkpointed if request.gradient_checkpointing else costs.plain
    # Padded copies of the pairs, and of their gradients, exist in addition to the originals.
    padded = (2 if request.precision in HALVES else 4) * costs.total.trained
    permanent = costs.state + costs.average + 4 * costs.total.trained + padded
    step = padded + (cost.together if request.accumulation == 1 else cost.activations + costs.gradients)
    base = costs.total.bytes
    if request.precision in HALVES and device.type == "cpu":
        # Finished runs generate images with the float32 weights, which stay in memory next to the half-precision copy.
        base += sum(4 * part.frozen for part in costs.components if part.name != "vae")
    if device.type == "cuda":
        permanent += _WORKSPACE
    return permanent, step, costs.previews, base


def free_memory(device: torch.device, devices: int) -> int:
    """Free bytes on a GPU, or a 1 / ``devices`` share of the free memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // devices
