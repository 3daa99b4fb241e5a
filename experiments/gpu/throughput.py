"""Checks of throughput: a shared sweep, sampling, and diffusers' LoRA script next to sdtune."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from experiments.benchmark.commands import SCRIPTS, Shape, peer
from experiments.gpu.clock import GIB
from experiments.gpu.configurations import SIDES, Configuration, images_folder
from experiments.gpu.report import Measurement, Skipped
from experiments.gpu.speed import clocked
from experiments.gpu.workplace import Workplace
from sdtune.files import read_json, write_json

_RUNS = (1, 2, 4, 8)
_SWEEP_STEPS = 50

_REQUIRED = ("accelerate", "datasets", "torchvision")
"""Packages that diffusers' script imports and sdtune does not."""

_WARM_UP, _TIMED = 5, 10


def sweep(place: Workplace) -> Iterator[Measurement]:
    """Seconds per step of one run in a sweep of LoRAs on pocket that share a backbone."""
    for runs in _RUNS:
        yield Measurement(f"{runs} runs", 40, partial(_sweep, place, runs))


def _sweep(place: Workplace, runs: int) -> dict[str, Any]:
    folder = place.new_run_folder(f"sweep-{runs}")
    words = [
        *("-m", "hydra/launcher=shared_backbone", "experiment=lora_subject", "hardware=gpu"),
        f"seed={','.join(map(str, range(runs)))}",
        f"trainer.max_steps={_SWEEP_STEPS}",
        *("callbacks.samples=null", "evaluation=none", f"hydra.sweep.dir={folder}"),
    ]
    place.sdtune(f"sweep {runs}", 40, "train", *words)
    metrics = [read_json(file) for file in folder.glob("*/metrics.json")]
    together = min((job.get("shared_with") or 1 for job in metrics), default=0)
    # All runs step together, so their step times are those of the group.
    seconds = median(job["median_step_seconds"] for job in metrics)
    return {"ok": len(metrics) == together == runs, "together": together, "seconds_per_run_step": seconds / runs}


def sampling(place: Workplace) -> Iterator[Measurement]:
    """Images per second with a LoRA, without loading the model."""
    for kind, name in (("sd15", "SD 1.5"), ("sdxl", "SDXL")):
        side = SIDES[kind]
        yield Measurement(f"{name}, {side}x{side}", 60, partial(_sampling, place, kind))


def _sampling(place: Workplace, kind: str) -> dict[str, Any]:
    file = place.work / f"sampling-{kind}.json"
    place.start(f"sampling {kind}", 60, "experiments.gpu.drawing:draw", place.work, kind, file).wait()
    return read_json(file)


def diffusers(place: Workplace) -> Iterator[Measurement]:
    """A step of diffusers' train_text_to_image_lora.py and of sdtune, on the same images and weights."""
    for batch in (1, 4):
        configuration = Configuration(f"sdtune, batch {batch}", "sd15", "lora", batch, ("method.rank=4",))
        yield Measurement(configuration.name, 25, partial(_own_step, place, configuration))
        yield Measurement(f"diffusers, batch {batch}", 40, partial(_peer_step, place, batch))


def _own_step(place: Workplace, configuration: Configuration) -> dict[str, Any]:
    _check_checkout(place)
    clock = clocked(place, configuration.name, configuration.settings(place.work), 25)
    return {key: clock[key] for key in ("step_ms", "peak_gib")}


def _peer_step(place: Workplace, batch: int) -> dict[str, Any]:
    examples = _check_checkout(place)
    shape = Shape("sd15", place.work / "sd15", SIDES["sd15"], batch)
    run, data = place.new_run_folder(f"diffusers-{batch}"), images_folder(place.work, "sd15")
    script = peer(examples, "lora", shape, data, run, "bf16-mixed")
    file = place.work / f"diffusers-{batch}.json"
    file.unlink(missing_ok=True)
    place.start(f"diffusers {batch}", 40, f"{__name__}:script_steps", file, script.target, *script.arguments).wait()
    return read_json(file)


def _check_checkout(place: Workplace) -> Path:
    """Folder ``examples`` of the checkout.

    Raises:
        Skipped: no checkout is named, or a package is missing that its script needs.
    """
    if place.diffusers is None:
        raise Skipped("no checkout is named; add --diffusers CHECKOUT")
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"diffusers' script needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    examples = place.diffusers / "examples"
    if not (examples / SCRIPTS["lora"]).is_file():
        raise Skipped(f"{place.diffusers} has no examples/{SCRIPTS['lora']}")
    return examples


def script_steps(file: Path, script: str, *words: str) -> None:
    """Run ``script WORDS`` and write step time and peak to ``file`` after some optimizer steps; ends the process."""
    number, began = 0, 0.0

    def after_step(*_: Any) -> None:
        nonlocal number, began
        number += 1
        if number == _WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        elif number == _WARM_UP + _TIMED:
            torch.cuda.synchronize()
            step_ms = 1000 * (time.perf_counter() - began) / _TIMED
            write_json(file, {"step_ms": step_ms, "peak_gib": torch.cuda.max_memory_allocated() / GIB})
            sys.stdout.flush()
            os._exit(0)

    register_optimizer_step_post_hook(after_step)
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    raise RuntimeError(f"{Path(script).name} ended before {_WARM_UP + _TIMED} optimizer steps")
