"""Checks at true shapes: lines that wait for the GPU, speed and memory of a step, and runs on smaller GPUs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from experiments.gpu.clock import CONTEXT, GIB, RESULT, MemoryLimit
from experiments.gpu.configurations import CARDS, SPEED, WAITS, Card, Configuration, that_fits
from experiments.gpu.processes import command
from experiments.gpu.report import Measurement, Skipped
from experiments.gpu.workplace import Workplace
from sdtune.files import read_json, write_json

_SECONDS = {"sd15": 25.0, "sdxl": 45.0}


def waits(place: Workplace) -> Iterator[Measurement]:
    """Lines at which a step waits for the GPU; none is expected."""
    for configuration in (c for c in SPEED if c.name in WAITS):
        yield Measurement(configuration.name, _SECONDS[configuration.kind], partial(_waits, place, configuration))


def _waits(place: Workplace, configuration: Configuration) -> dict[str, Any]:
    clock = _clocked(place, configuration)
    return {"ok": not clock["waits"], "steps": clock["watched"], "waits": clock["waits"]}


def speed(place: Workplace) -> Iterator[Measurement]:
    """Step time, host time and memory of each configuration, and the memory that ``sdtune plan`` counts."""
    for planned in SPEED:
        configuration = that_fits(planned, place.plans, place.gpu_gib) or planned
        is_measured = configuration.name in place.measured
        seconds = 0.0 if is_measured else _SECONDS[configuration.kind]
        yield Measurement(configuration.name, seconds, partial(_speed, place, configuration))


def _speed(place: Workplace, configuration: Configuration) -> dict[str, Any]:
    clock = _clocked(place, configuration)
    planned = place.plans[configuration.name]["step"]
    row = {key: clock[key] for key in ("step_ms", "host_ms", "peak_gib", "reserved_gib")}
    return {**row, "planned_gib": planned, "peak_of_planned": clock["peak_gib"] / planned}


def _clocked(place: Workplace, configuration: Configuration) -> dict[str, Any]:
    """Result of the clock, measured at the first call."""
    name = configuration.name
    if name not in place.measured:
        if that_fits(configuration, place.plans, place.gpu_gib) is not configuration:
            raise Skipped(f"needs {place.plans[name]['fits']:.1f} GiB, the GPU has {place.gpu_gib:.1f} GiB")
        place.measured[name] = clocked(place, name, configuration.settings(place.work), _SECONDS[configuration.kind])
    return place.measured[name]


def clocked(place: Workplace, name: str, settings: list[str], seconds: float) -> dict[str, Any]:
    """Train with the clock in a new process; returns what it has written.

    Raises:
        MeasurementFailed: the training failed, or took too long.
    """
    run = place.new_run_folder(name)
    words = [
        *("train", *settings, "trust=[experiments]", "+callbacks.clock={_target_: experiments.gpu.clock.Clock}"),
        # Nothing else happens in the measured steps.
        *("trainer.max_steps=1000", "trainer.log_every_n_steps=1000", "checkpoint.every_steps=1000"),
        f"hydra.run.dir={run}",
    ]
    place.sdtune(name, seconds, *words)
    return read_json(run / RESULT)


def cards(place: Workplace) -> Iterator[Measurement]:
    """Complete runs on 12, 16 and 24 GiB, each in a process whose allocator gets no more."""
    for card in CARDS:
        yield Measurement(card.name, 75, partial(_card, place, card))


def _card(place: Workplace, card: Card) -> dict[str, Any]:
    if place.gpu_gib < card.gib - CONTEXT:
        raise Skipped(f"the GPU has {place.gpu_gib:.1f} GiB")
    run = place.new_run_folder(f"card-{card.gib}")
    limit = f"+callbacks.limit={{_target_: experiments.gpu.clock.MemoryLimit, gib: {card.gib}}}"
    words = ["train", *card.arguments(place.work), "trust=[experiments]", limit, f"hydra.run.dir={run}"]
    file = run.with_name(f"{run.name}.json")
    fresh = place.new_cache(run.name)  # so that the run encodes its images
    place.start(run.name, 75, f"{__name__}:limited", file, *words, environment=fresh).wait()
    metrics = read_json(run / "metrics.json")
    reasons = [reason for reason in metrics.get("reasons", {}).values() if "memory" in reason]
    return {
        "ok": not reasons and metrics.get("clip_image") is not None,
        "steps": metrics["steps"],
        **read_json(file),
        "planned_gib": place.plans[card.name]["peak"],
        "step_ms": 1000 * metrics["median_step_seconds"] if metrics["median_step_seconds"] else None,
        "reasons": "; ".join(dict.fromkeys(reasons)) or None,
    }


def limited(file: Path, *words: str) -> None:
    """Run ``sdtune WORDS`` with the callback :class:`MemoryLimit`, and write the peak of the process to ``file``."""
    try:
        command(*words)
    finally:
        sys.stdout.flush()
        MemoryLimit.update()
        peaks = {"peak_gib": MemoryLimit.peak / GIB, "reserved_gib": MemoryLimit.reserved / GIB}
        write_json(file, peaks)
