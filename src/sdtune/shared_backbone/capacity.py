"""How many runs fit on a device at once, from the costs that ``sdtune plan`` counts."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from sdtune.hardware.precision import HALVES
from sdtune.planning.memory import ALLOWANCE
from sdtune.planning.request import PlanRequest, count
from sdtune.training.caching import drawn_at_once

_WORKSPACE = 32 * 2**20
"""Bytes that cuBLAS keeps for a thread, of which each run has its own: torch's default on Hopper, its largest."""


def room(requests: Sequence[PlanRequest], jobs: int, device: torch.device, devices: int = 1) -> int:
    """How many of ``jobs`` runs fit at once, at least 1.

    Args:
        requests: what any of the runs may cost, one request for each optimizer.
        jobs: how many there are.
        device: where they train.
        devices: how many devices are in use.
    """
    kept, step, previews, base = _largest_costs(requests, device)
    free = free_memory(device, devices) - ALLOWANCE - base
    fitting: int = min(jobs, free // (kept + step), (free - previews) // max(1, kept))
    return max(1, fitting)


def processes_that_fit(requests: Sequence[PlanRequest], most: int, device: torch.device) -> int:
    """How many processes, at most ``most``, can each have a backbone and one run in the memory of ``device``."""
    kept, step, previews, base = _largest_costs(requests, device)
    fitting: int = free_memory(device, 1) // (ALLOWANCE + base + kept + max(step, previews))
    return max(1, min(most, fitting))


def _largest_costs(requests: Sequence[PlanRequest], device: torch.device) -> list[int]:
    """The largest of each of :func:`run_costs` over ``requests``."""
    return [max(each) for each in zip(*(run_costs(request, device) for request in requests), strict=True)]


def run_costs(request: PlanRequest, device: torch.device) -> tuple[int, int, int, int]:
    """Bytes: what a run keeps, what its step takes beside it, what images take, and what all runs have in common."""
    # Images of several runs are drawn in passes of so many, while what all keep stays where it is.
    costs = count(request, previews=max(request.previews or 1, drawn_at_once(request.side)))
    cost = costs.checkpointed if request.gradient_checkpointing else costs.plain
    # Padded, pairs lie beside themselves, and their gradients do.
    padded = (2 if request.precision in HALVES else 4) * costs.total.trained
    kept = costs.state + costs.average + 4 * costs.total.trained + padded
    step = padded + (cost.together if request.accumulation == 1 else cost.activations + costs.gradients)
    base = costs.total.bytes
    if request.precision in HALVES:
        # The base stays as it was loaded, for runs that have ended draw on it, beside the half that is trained on.
        base += sum(4 * part.frozen for part in costs.components if part.name != "vae")
    if device.type == "cuda":
        kept += _WORKSPACE
    return kept, step, costs.previews, base


def free_memory(device: torch.device, devices: int) -> int:
    """Bytes of a device, or its share of those that a CPU's machine has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // devices
