"""Benchmark of a sweep of eight LoRAs (4 ranks, 2 learning rates): sequential, two processes, shared backbone."""

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
    """Loop and wall time of each way in seconds, measured in turn, and the largest difference of the artifacts.

    The loop time is the time of the optimizer steps of all jobs, computed from the median step times in their
    metrics.json: their sum for sequential jobs, half of the sum for two processes, the median for a shared backbone,
    where all jobs step together.
    """
    sweep_folder = folder / "sweep"
    results: dict[str, Any] = {way: {"loop_seconds": [], "wall_seconds": []} for way in WAYS}
    for turn in range(ROUNDS):
        for way in WAYS:
            for stale in (sweep_folder / way, sweep_folder / "cache"):
                shutil.rmtree(stale, ignore_errors=True)
            wall = _run(way, batch, precision, sweep_folder)
            metrics = [
                json.loads(file.read_text(encoding="utf-8")) for file in (sweep_folder / way).glob("*/metrics.json")
            ]
            if len(metrics) != 8:
                raise RuntimeError(f"{way}: {len(metrics)} of 8 jobs are complete; see {sweep_folder / way}")
            if way == "shared backbone" and {figures["shared_with"] for figures in metrics} != {8}:
                raise RuntimeError(f"{way}: the eight jobs did not all share one backbone")
            step_seconds = [figures["median_step_seconds"] for figures in metrics]
            loop = {"one after another": sum(step_seconds), "two processes at once": sum(step_seconds) / 2}.get(
                way, median(step_seconds)
            )
            results[way]["loop_seconds"].append(loop * STEPS)
            results[way]["wall_seconds"].append(wall)
            print(
                f"sweep, batch {batch}, {precision}, {way} {turn}: {wall:.1f} s, loop {loop * STEPS:.1f} s", flush=True
            )
    results["largest difference"] = max(
        _largest_difference(sweep_folder / "one after another" / job, sweep_folder / "shared backbone" / job)
        for job in map(str, range(8))
    )
    shutil.rmtree(sweep_folder)
    return results


def _run(way: str, batch: int, precision: str, sweep_folder: Path) -> float:
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
        f"hydra.sweep.dir={sweep_folder / way}",
        *WAYS[way],
    ]
    cache = {"SDTUNE_CACHE": str(sweep_folder / "cache")}
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "sdtune", "train", *arguments],
        env=os.environ | cache,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"{way}: {process.stdout[-1000:]}{process.stderr[-2000:]}")
    return time.monotonic() - start


def _largest_difference(one: Path, other: Path) -> float:
    """Largest difference of a tensor in the LoRA files of two runs, relative to its norm."""
    (file,), (reference_file,) = (
        list((run / "artifact").glob("pytorch_lora_weights.safetensors")) for run in (one, other)
    )
    tensors, references = load_file(file), load_file(reference_file)
    return max(
        float((tensors[name] - reference).norm() / reference.norm().clamp_min(torch.finfo(reference.dtype).tiny))
        for name, reference in references.items()
    )
