"""A sweep of eight LoRAs, 4 ranks by 2 rates: one after another, two at once, and all on one backbone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

ROUNDS = 3
STEPS = 60
GRID = ("method.rank=4,8,16,32", "optimizer.lr=1e-3,1e-4")
WAYS = {
    "one after another": ["hydra/launcher=basic"],
    "two processes at once": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "shared backbone": ["hydra/launcher=shared_backbone", "hydra.launcher.processes=1"],
}


def sweeps(batch: int, precision: str, folder: Path) -> dict[str, Any]:
    """Loop and wall time of each way, by turns, and how far the artifacts lie apart.

    The loop's time is that of all jobs' optimizer steps, from the medians that the runs themselves write: with two
    at once half of the sum, on one backbone that of one job, whose steps are everyone's.
    """
    place = folder / "sweep"
    found: dict[str, Any] = {way: {"loop_seconds": [], "wall_seconds": []} for way in WAYS}
    for turn in range(ROUNDS):
        for way in WAYS:
            for kept in (place / way, place / "cache"):
                shutil.rmtree(kept, ignore_errors=True)
            wall = _run(way, batch, precision, place)
            written = [json.loads(file.read_text()) for file in (place / way).glob("*/metrics.json")]
            if len(written) != 8:
                raise RuntimeError(f"{way}: {len(written)} of 8 jobs are complete; see {place / way}")
            if way == "shared backbone" and {figures["shared_with"] for figures in written} != {8}:
                raise RuntimeError(f"{way}: there was no room for eight at once")
            each = [figures["median_step_seconds"] for figures in written]
            loop = {"one after another": sum(each), "two processes at once": sum(each) / 2}.get(way, median(each))
            found[way]["loop_seconds"].append(loop * STEPS)
            found[way]["wall_seconds"].append(wall)
            print(
                f"sweep, batch {batch}, {precision}, {way} {turn}: {wall:.1f} s, loop {loop * STEPS:.1f} s", flush=True
            )
    found["largest difference"] = max(
        _apart(place / "one after another" / job, place / "shared backbone" / job) for job in map(str, range(8))
    )
    shutil.rmtree(place)
    return found


def _run(way: str, batch: int, precision: str, place: Path) -> float:
    arguments = [
        "-m",
        "experiment=lora_subject",
        f"data.batch_size={batch}",
        "method.targets=[cross_attention,self_attention]",
        *GRID,
        f"trainer.max_steps={STEPS}",
        "hardware=cpu",
        f"hardware.precision={precision}",
        "callbacks.samples=null",
        "evaluation=none",
        f"hydra.sweep.dir={place / way}",
        *WAYS[way],
    ]
    cache = {"SDTUNE_CACHE": str(place / "cache")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sdtune", "train", *arguments],
        env=os.environ | cache,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.monotonic() - began


def _apart(one: Path, other: Path) -> float:
    """The largest difference of a tensor of two artifacts, of its norm."""
    (here,), (there,) = (list((run / "artifact").glob("pytorch_lora_weights.safetensors")) for run in (one, other))
    ours, theirs = load_file(here), load_file(there)
    return max(float((ours[n] - t).norm() / t.norm().clamp_min(torch.finfo(t.dtype).tiny)) for n, t in theirs.items())
