"""Checks of values: the five methods against a CPU, and a resumed run against an uninterrupted one."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from experiments.gpu.configurations import SIDES, images_folder
from experiments.gpu.processes import COMMAND
from experiments.gpu.report import Measurement
from experiments.gpu.workplace import Workplace
from sdtune.files import read_json, write_json
from sdtune.runs.metrics import read_metrics

TOLERANCE = 1e-3
"""Largest relative difference of a loss or a gradient norm from the CPU's."""

_STEPS = 6
_COLUMNS = ("loss", "grad_norm")

_REFERENCE = "cpu_reference.json"
"""File of the CPU's values in the folder of the results, for ``--cpu-reference`` of a later check."""

_EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
"""trainer.deterministic=true does not turn off TF32 in convolutions."""

Values = dict[str, list[float]]
"""Column of metrics.csv -> value of each step."""


def methods(place: Workplace) -> Iterator[Measurement]:
    """Losses and gradient norms of the five methods on pocket in float32, on the GPU and on the CPU."""
    reference = read_json(place.cpu_reference) if place.cpu_reference is not None else {}
    for name, settings in _pocket(place.work).items():
        yield Measurement(name, 40, partial(_method, place, name, settings, reference))


def _pocket(work: Path) -> dict[str, list[str]]:
    """Settings of each method; no image is generated, because its rounded pixels would depend on the device."""
    data = images_folder(work, "pocket")
    folder = [
        "data=folder",
        f"data.path={data / 'captioned'}",
        f"data.class_path={data / 'bare'}",
        "data.class_prompt=a photo of a bird",
        f"data.resolution={SIDES['pocket']}",
    ]
    return {
        "textual_inversion": ["experiment=textual_inversion_subject"],
        "lora": ["experiment=lora_subject"],
        "dreambooth": ["experiment=dreambooth_subject", *folder],
        "full": ["experiment=full_subject"],
        "controlnet": ["experiment=controlnet_canny", "data.images=64", "data.batch_size=8"],
    }


def _method(place: Workplace, name: str, settings: Sequence[str], reference: dict[str, Values]) -> dict[str, Any]:
    with ExitStack() as stack:
        runs = {}
        for device in ("gpu", *([] if name in reference else ["cpu"])):
            run = place.new_run_folder(f"{name}-{device}")
            words = ["train", *settings, *_float32(device), f"hydra.run.dir={run}"]
            # A common cache would give the GPU the latents of the CPU.
            cache = place.new_cache(run.name)
            process = place.start(f"methods {name} {device}", 40, COMMAND, *words, environment=_EXACT | cache)
            stack.callback(process.stop)
            runs[run] = process
        for process in runs.values():
            process.wait()
        values = [_values(run / "metrics.csv") for run in runs]
    if name not in reference:
        reference[name] = values[1]
        write_json(place.out / _REFERENCE, reference)
    return compared(values[0], reference[name])


def _float32(device: str) -> list[str]:
    return [
        f"hardware={device}",
        "hardware.precision=32-true",
        "trainer.deterministic=true",
        f"trainer.max_steps={_STEPS}",
        "trainer.log_every_n_steps=1",
        "lr_schedule=constant",
        "lr_schedule.warmup_steps=0",
        "callbacks.samples=null",
        "evaluation=none",
    ]


def _values(file: Path) -> Values:
    rows = [row for row in read_metrics(file).rows if row["loss"]]
    return {column: [float(row[column]) for row in rows] for column in _COLUMNS}


def compared(values: Values, reference: Values) -> dict[str, Any]:
    """Row of a method: its values, and their largest relative difference from the ``reference``."""
    differences = [
        abs(value - expected) / max(abs(expected), 1e-12)
        for column in _COLUMNS
        for value, expected in zip(values[column], reference[column], strict=True)
    ]
    # A NaN is never within the tolerance, but max() may return another value.
    is_close = bool(differences) and all(difference <= TOLERANCE for difference in differences)
    worst = next((d for d in differences if d != d), max(differences, default=None))
    return {"ok": is_close, "worst_relative_difference": worst, "gpu": values, "cpu": reference}


def resume(place: Workplace) -> Iterator[Measurement]:
    """Whether the artifact of a resumed run equals that of an uninterrupted one byte by byte."""
    yield Measurement("lora_subject", 60, partial(_resumed, place))


def _resumed(place: Workplace) -> dict[str, Any]:
    full_run, resumed_run = place.new_run_folder("uninterrupted"), place.new_run_folder("resumed")
    settings = [
        *("experiment=lora_subject", "hardware=gpu", "trainer.deterministic=true", "checkpoint.every_steps=10"),
        # A schedule and its warm-up may depend on the number of steps, which differs before the resume.
        *("lr_schedule=constant", "lr_schedule.warmup_steps=0", "callbacks.samples=null", "evaluation=none"),
    ]
    for run, steps in ((full_run, 20), (resumed_run, 10)):
        words = [*settings, f"trainer.max_steps={steps}", f"hydra.run.dir={run}"]
        place.sdtune(f"resume {run.name}", 20, "train", *words)
    place.sdtune("resume", 20, "train", f"resume={resumed_run}", "trainer.max_steps=20")
    files = sorted(file.relative_to(full_run) for file in (full_run / "artifact").rglob("*.safetensors"))
    different = [str(f) for f in files if not filecmp.cmp(full_run / f, resumed_run / f, shallow=False)]
    return {"ok": bool(files) and not different, "files": len(files), "different": ", ".join(different) or None}
