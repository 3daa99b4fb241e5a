"""Run folders as ``sdtune train`` writes them, made quickly for tests of the report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdtune.images.grids import save_png

PROMPTS = ("a photo of sks bird", "a drawing of a sks bird on a table")


def data_of(file: Path) -> dict[str, Any]:
    """Data of the script of a report."""
    match = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', file.read_text(encoding="utf-8"))
    assert match is not None
    content: dict[str, Any] = json.loads(match[1])
    return content


def write_run(
    folder: Path,
    overrides: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    steps: int = 60,
    side: int = 32,
) -> Path:
    """Write a run of a LoRA with curves, samples at three steps, and three training images.

    Args:
        overrides: settings of its command line, such as ``{"method.rank": 4}``.
        metrics: content of ``metrics.json``; None for a run that goes on.
        side: pixels of its images.
    """
    (folder / ".hydra").mkdir(parents=True)
    config: dict[str, Any] = {
        "method": {"_target_": "sdtune.methods.LoRA", "rank": 8},
        "backbone": {"path": "pocket"},
        "data": {"_target_": "sdtune.data.Folder", "path": "images"},
        "optimizer": {"lr": 1e-4},
        "trainer": {"max_steps": steps},
        "evaluation": {"images": 4000},
        "seed": 0,
    }
    for key, value in overrides.items():
        *groups, name = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[name] = value
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    lines = ["method=lora", *(f"{key}={value}" for key, value in overrides.items())]
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(lines), encoding="utf-8")
    rows = [f"{step},{1 / step + 0.01 * (step % 3)},{0.5},{1e-4}" for step in range(1, steps + 1)]
    (folder / "metrics.csv").write_text("\n".join(["step,loss,grad_norm,lr/denoiser", *rows]) + "\n", encoding="utf-8")
    _write_images(folder, steps, side, len(str(sorted(overrides.items()))))
    (folder / "artifact").mkdir()
    (folder / "artifact" / "bird.safetensors").touch()
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def _write_images(folder: Path, steps: int, side: int, tone: int) -> None:
    rng = np.random.default_rng(tone)
    for step in (0, steps // 2, steps):
        for number, prompt in enumerate(PROMPTS):
            noise = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            image = np.full((side, side, 3), 60 * number + 20, np.uint8) if step == 0 else noise
            metadata = {"prompt": prompt, "seed": "0"}
            save_png(image, folder / "samples" / f"step{step:08d}" / f"{number:03d}_seed0.png", metadata)
    shown = []
    for number in range(3):
        image = np.full((side, side, 3), 80 * number, np.uint8)
        save_png(image, folder / "training_images" / f"{number:03d}.png")
        shown.append({"file": f"{number:03d}.png", "caption": f"image {number} of a sks bird", "repeats": 1})
    content = {"images": 5, "validation_images": 0, "class_images": 0, "shown": shown}
    (folder / "training_images" / "images.json").write_text(json.dumps(content), encoding="utf-8")


def write_sweep(folder: Path, side: int = 32) -> Path:
    """Write a finished sweep of 2 ranks x 2 learning rates x 3 seeds; the best setting is rank 8, lr 0.001."""
    for rank in (4, 8):
        for number, lr in enumerate((1e-4, 1e-3)):
            for seed in range(3):
                gain = 0.2 + 0.05 * rank + 0.3 * number + 0.01 * seed
                metrics = {"subject_gain": gain, "clip_image": 0.6 + 0.1 * gain, "base_clip_image": 0.5}
                metrics |= {"memorisation": 0.7, "diversity": 0.3, "steps": 60, "median_step_seconds": 0.1 * rank}
                metrics |= {
                    "artifact_bytes": 2**20 * rank,
                    "peak_memory_bytes": 2**30,
                    "trainable_parameters": 1000 * rank,
                }
                overrides = {"method.rank": rank, "optimizer.lr": lr, "seed": seed}
                write_run(folder / f"{6 * (rank == 8) + 3 * number + seed}", overrides, metrics, side=side)
    (folder / "multirun.yaml").write_text("{}", encoding="utf-8")
    (folder / "sweep.json").write_text("{}", encoding="utf-8")
    return folder
