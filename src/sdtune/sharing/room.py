"""How many runs a device holds at once, by what ``sdtune plan`` counts of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch

from sdtune import plan_run
from sdtune.backbone.backbone import HALVES
from sdtune.methods.encoding import drawn_at_once
from sdtune.planning.memory import ALLOWANCE
from sdtune.sharing.groups import widest

_WORKSPACE = 32 * 2**20
"""Bytes that cuBLAS keeps for a thread, of which each run has its own: torch's default on Hopper, its largest."""


def room(jobs: Sequence[plan_run.Job], device: torch.device, devices: int = 1) -> int:
    """At least 1; ``jobs`` may share a backbone, and so many ``devices`` are in use."""
    optimizers = {str(job.config["optimizer"]["_target_"]): job.config["optimizer"] for job in jobs}
    costs = [_costs(_largest(jobs, optimizer), device) for optimizer in optimizers.values()]
    kept, step, previews, base = (max(each) for each in zip(*costs, strict=True))
    free = _free(device, devices) - ALLOWANCE - base
    count: int = min(len(jobs), free // (kept + step), (free - previews) // max(1, kept))
    return max(1, count)


def _largest(jobs: Sequence[plan_run.Job], optimizer: Mapping[str, Any]) -> plan_run.Job:
    """A job with all that any of ``jobs`` has: a site that one opens is padded, and keeps activations, for each."""
    first = jobs[0]
    methods = [job.config["method"] for job in jobs]
    method = dict(methods[0])
    if "rank" in method:
        method |= {"rank": max(map(widest, methods)), "blocks": None, "alpha_policy": "rank", "alpha": None}
        method |= {"weights": None, "dropout": max(float(each.get("dropout", 0)) for each in methods)}
        for key in ("targets", "projections"):
            if named := {one for each in methods for one in each.get(key) or ()}:
                method[key] = sorted(named)
    callbacks = [job.config["callbacks"] for job in jobs]
    drawn = [each["samples"] for each in callbacks if each.get("samples")]
    own = {
        "samples": max(drawn, key=lambda samples: samples["sampling"]["batch_size"], default=None),
        "ema": next((each["ema"] for each in callbacks if each.get("ema")), None),
    }
    config = {**first.config, "method": method, "optimizer": optimizer, "callbacks": {**callbacks[0], **own}}
    for key in ("new_tokens", "tokens_lr"):
        if given := [job.config[key] for job in jobs if job.config.get(key)]:
            config[key] = given[0]
    caches = {key: all(job.data[key] for job in jobs) for key in ("cache_latents", "cache_text")}
    return replace(first, config=config, data={**first.data, **caches})


def _costs(job: plan_run.Job, device: torch.device) -> tuple[int, int, int, int]:
    """Bytes: what a run keeps, what its step takes beside it, what pictures take, and what all runs have in common."""
    # Pictures of several runs are drawn in passes of so many, while what all keep stays where it is.
    samples = job.config["callbacks"].get("samples")
    one = samples["sampling"]["batch_size"] if samples else 1
    figures = plan_run.figures(job, previews=max(one, drawn_at_once(job.side)))
    cost = figures.checkpointed if job.config["hardware"].get("gradient_checkpointing") else figures.plain
    # Padded, pairs lie beside themselves, and their gradients do.
    padded = (2 if job.precision in HALVES else 4) * figures.total.trained
    kept = figures.state + figures.average + 4 * figures.total.trained + padded
    step = padded + (cost.together if job.accumulation == 1 else cost.activations + figures.gradients)
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
