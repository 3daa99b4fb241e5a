"""How many runs a device holds at once, by what ``sdtune plan`` counts of one."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from sdtune import plan_run
from sdtune.backbone.backbone import HALVES
from sdtune.methods.encoding import drawn_at_once
from sdtune.planning.memory import ALLOWANCE
from sdtune.sharing.groups import widest


def room(jobs: Sequence[plan_run.Job], device: torch.device, devices: int = 1) -> int:
    """At least 1; ``jobs`` may share a backbone, and so many ``devices`` are in use."""
    # The widest job stands for all.
    job = max(jobs, key=lambda job: widest(job.config["method"]))
    # Pictures of several runs are drawn in passes of so many, while what all keep stays where it is.
    samples = job.config["callbacks"].get("samples")
    one = samples["sampling"]["batch_size"] if samples else 1
    figures = plan_run.figures(job, previews=max(one, drawn_at_once(job.side)))
    cost = figures.checkpointed if job.config["hardware"].get("gradient_checkpointing") else figures.plain
    kept = figures.state + figures.average + 4 * figures.total.trained
    step = cost.together if job.accumulation == 1 else cost.activations + figures.gradients
    base = figures.total.bytes
    if job.precision in HALVES:
        # The base stays as it was loaded, for runs that have ended draw on it, beside the half that is trained on.
        base += sum(4 * part.frozen for part in figures.components if part.name != "vae")
    free = _free(device, devices) - ALLOWANCE - base
    return max(1, min(len(jobs), free // (kept + step), (free - figures.previews) // max(1, kept)))


def _free(device: torch.device, devices: int) -> int:
    """Bytes of a device, or its share of those that a CPU's machine has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // devices
