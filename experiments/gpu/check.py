"""Check of sdtune on a GPU in ten minutes (``make gpu-check``): values, waits, speed, memory, resume, sweeps.

Needs no network and no weights: pocket is included, and SD 1.5 and SDXL get random weights of their true shapes (12 GB
in ``--work``). The checks are ordered by their value. Each row is written to ``OUT/gpu.json`` as soon as it is
measured, and the budget decides before each row whether it still fits. Exit code 1: there is no GPU, or a row is not
as expected.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.benchmark.commands import images
from experiments.gpu import page
from experiments.gpu.configurations import SIDES, images_folder
from experiments.gpu.processes import MeasurementFailed, Measuring
from experiments.gpu.report import Budget, Measurement, Report
from experiments.gpu.speed import cards, speed, waits
from experiments.gpu.throughput import diffusers, sampling, sweep
from experiments.gpu.values import methods, resume
from experiments.gpu.workplace import Workplace
from sdtune.errors import UserError
from sdtune.files import read_json
from sdtune.suggest import suggestion

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """A group of rows.

    Args:
        measurements: yields the rows to measure.
        true_shapes: whether it reads the weights of SD 1.5 and SDXL, and the plans.
    """

    measurements: Callable[[Workplace], Iterator[Measurement]]
    true_shapes: bool = False


CHECKS = {
    "methods": Check(methods),
    "waits": Check(waits, true_shapes=True),
    "speed": Check(speed, true_shapes=True),
    "cards": Check(cards, true_shapes=True),
    "resume": Check(resume),
    "sweep": Check(sweep),
    "sampling": Check(sampling, true_shapes=True),
    "diffusers": Check(diffusers, true_shapes=True),
}
"""In the order in which they are measured."""

_PLANNERS = 4
"""Processes that plan; SDXL takes up to half a minute per configuration."""

_DISK = 24
"""GiB of free disk space that weights, caches and runs need."""


def selected(names: str) -> list[str]:
    """Checks in ``names``, which are separated by commas, in the order of :data:`CHECKS`; all if it is empty.

    Raises:
        UserError: a name is unknown.
    """
    requested = [name for name in names.split(",") if name]
    for name in requested:
        if name not in CHECKS:
            raise UserError(
                f"unknown check {name}{suggestion(name, list(CHECKS))}",
                key="--only",
                remedy=f"available: {', '.join(CHECKS)}",
            )
    return [name for name in CHECKS if not requested or name in requested]


def check(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Measure the selected checks; returns the rows.

    Raises:
        UserError: the arguments are wrong, or there is no GPU; nothing is written then.
    """
    names = selected(arguments.only)
    has_true_shapes = any(CHECKS[name].true_shapes for name in names)
    if not torch.cuda.is_available():
        raise UserError("torch has no GPU", remedy="run sdtune doctor, which shows the reason")
    if has_true_shapes and (free := shutil.disk_usage(work).free / GIB) < _DISK:
        raise UserError(f"{work} has {free:.0f} GiB free, {_DISK} are needed", key="--work", remedy="use another disk")
    # The processes are forked from one that has imported huggingface_hub, which reads these at its import.
    os.environ.update({"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"})
    budget = Budget(arguments.seconds)
    place = Workplace(arguments.out.absolute(), work, budget, 0.0, arguments.cpu_reference, arguments.diffusers)
    with ExitStack() as stack:
        preparations = _start_preparations(place, arguments.seconds) if has_true_shapes else []
        for preparation in preparations:
            stack.callback(preparation.stop)
        images(images_folder(work, "pocket"), SIDES["pocket"])
        place.start("machine", 60, "experiments.gpu.machine:describe", work / "machine.json").wait()
        machine = read_json(work / "machine.json")
        place.gpu_gib = machine["gib"]
        report = Report(place.out, machine, budget)
        run(names, place, report, preparations)
    return report.rows


def _start_preparations(place: Workplace, seconds: float) -> list[Measuring]:
    """Start to write the plans, and the images and weights of true shapes, in processes that do not see the GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    started = [place.start("weights", seconds, "experiments.gpu.weights:prepare", place.work, environment=hidden)]
    for number, file in enumerate(_plan_files(place)):
        arguments = (place.work, file, number, _PLANNERS)
        started.append(
            place.start(file.stem, seconds, "experiments.gpu.plans:write_plans", *arguments, environment=hidden)
        )
    return started


def _plan_files(place: Workplace) -> list[Path]:
    return [place.work / f"plans-{number}.json" for number in range(_PLANNERS)]


def run(names: Sequence[str], place: Workplace, report: Report, preparations: Sequence[Measuring]) -> None:
    """Measure the checks ``names``; those at true shapes wait for the ``preparations``."""
    for name in names:
        if CHECKS[name].true_shapes and not place.plans:
            try:
                for preparation in preparations:
                    preparation.limit = min(preparation.limit, max(0.0, place.budget.left))
                    preparation.wait()
                place.plans = {name: plan for file in _plan_files(place) for name, plan in read_json(file).items()}
            except (MeasurementFailed, OSError) as error:
                report.fail(name, error)
                continue
        report.run(name, _removing_runs(place, CHECKS[name].measurements(place)))


def _removing_runs(place: Workplace, measurements: Iterator[Measurement]) -> Iterator[Measurement]:
    """The ``measurements``; after each, its runs are removed, whose checkpoints and artifacts may have gigabytes."""
    for measurement in measurements:
        yield measurement
        place.remove_runs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and the logs of the processes")
    parser.add_argument("--seconds", type=float, default=600, help="time budget (default: 600)")
    parser.add_argument("--only", default="", help=f"checks, separated by commas: {','.join(CHECKS)}")
    parser.add_argument("--cpu-reference", type=Path, help="cpu_reference.json of an earlier check (default: computed)")
    parser.add_argument("--diffusers", type=Path, help="checkout of diffusers; its LoRA script is measured too")
    parser.add_argument("--work", type=Path, help="folder for weights and runs, to use them again (default: temporary)")
    parser.add_argument("--page", action="store_true", help="write the tables of experiments/gpu/README.md")
    arguments = parser.parse_args()
    try:
        with ExitStack() as stack:
            if arguments.work is None:
                work = stack.enter_context(tempfile.TemporaryDirectory(prefix="sdtune-gpu-"))
            else:
                work = str(arguments.work.absolute())
                arguments.work.mkdir(parents=True, exist_ok=True)
            rows = check(arguments, Path(work))
        if arguments.page:
            page.write(arguments.out / "gpu.json")
    except (UserError, MeasurementFailed) as error:
        raise SystemExit(f"gpu check: {error}") from error
    if not all(row.get("ok", True) for row in rows) or all("skipped" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
