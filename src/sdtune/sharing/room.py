"""How many runs a device holds at once, by what ``sdtune plan`` counts of one."""

from __future__ import annotations

import json
from collections.abc import Sequence

import psutil
import torch

from sdtune import plan_run
from sdtune.backbone.backbone import HALVES
from sdtune.methods.encoding import drawn_at_once
from sdtune.planning.memory import ALLOWANCE
from sdtune.sharing.groups import widest

_RANK_AND_RATE = ("rank", "alpha", "alpha_policy", "text_encoder_lr")

_WORKSPACE = 32 * 2**20
"""Bytes that cuBLAS keeps for a thread, of which each run has its own: torch's default on Hopper, its largest."""


def room(jobs: Sequence[plan_run.Job], device: torch.device, devices: int = 1) -> int:
    """At least 1; ``jobs`` may share a backbone, and so many ``devices`` are in use."""
    kinds: dict[str, plan_run.Job] = {}
    for job in sorted(jobs, key=lambda job: widest(job.config["method"])):
        kinds[_kind(job)] = job  # the widest stands for all of its kind
    # None stands for another kind: a site that one run opens keeps activations of all.
    costs = [_costs(job, device) for job in kinds.values()]
    kept, step, previews, base = (max(each) for each in zip(*costs, strict=True))
    free = _free(device, devices) - ALLOWANCE - base
    return max(1, min(len(jobs), free // (kept + step), (free - previews) // max(1, kept)))


def _kind(job: plan_run.Job) -> str:
    """What jobs have in common that need the same memory, but for their rank."""
    method = {key: value for key, value in job.config["method"].items() if key not in _RANK_AND_RATE}
    optimizer = {key: value for key, value in job.config["optimizer"].items() if key not in ("lr", "weight_decay")}
    parts = bool(job.config.get("new_tokens")), job.config["callbacks"].get("ema") is not None
    caches = job.data["cache_latents"], job.data["cache_text"]
    return json.dumps([method, optimizer, parts, caches], sort_keys=True, default=str)


def _costs(job: plan_run.Job, device: torch.device) -> tuple[int, int, int, int]:
    """Bytes: what a run keeps, what its step takes beside it, what pictures take, and what all runs have in common."""
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
    if device.type == "cuda":
        kept += _WORKSPACE
    return kept, step, figures.previews, base


def _free(device: torch.device, devices: int) -> int:
    """Bytes of a device, or its share of those that a CPU's machine has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // devices
