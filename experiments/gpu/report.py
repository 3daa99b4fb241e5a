"""Rows of the check, written after each of them, and the time budget that decides which are measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.gpu.processes import MeasurementFailed
from sdtune.files import write_json

RESULTS = "gpu.json"


class Skipped(Exception):
    """A measurement is not possible here; the text says why."""


@dataclass
class Budget:
    """Seconds that the check may take, counted from the construction."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def spent(self) -> float:
        return self.clock() - self._start

    @property
    def left(self) -> float:
        return self.seconds - self.spent


@dataclass(frozen=True)
class Measurement:
    """One row.

    Args:
        seconds: what it takes at the most on a GPU with the speed of an A100; not measured if less is left.
        measure: returns the values of the row; ``ok`` among them is whether they are as expected (default: True).
    """

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]


class Report:
    """The rows of a check in ``folder/gpu.json``.

    Args:
        machine: description of the GPU and the software.
    """

    def __init__(self, folder: Path, machine: dict[str, Any], budget: Budget) -> None:
        self.path = folder / RESULTS
        self._machine, self._budget = machine, budget
        self.rows: list[dict[str, Any]] = []

    def run(self, check: str, measurements: Iterable[Measurement]) -> None:
        """Add one row for each of the ``measurements``; a failed one does not prevent the next."""
        for measurement in measurements:
            began = self._budget.spent
            row = {"check": check, "name": measurement.name, **self._outcome(measurement)}
            self._add(row | {"seconds": self._budget.spent - began})

    def fail(self, check: str, error: Exception) -> None:
        """Add the row of a check that has failed before its first measurement."""
        self._add({"check": check, "name": "preparation", **_failed(error)})

    def _outcome(self, measurement: Measurement) -> dict[str, Any]:
        left = self._budget.left
        if left < measurement.seconds:
            return {"skipped": f"{max(left, 0):.0f} s are left, it takes up to {measurement.seconds:.0f} s"}
        try:
            return {"ok": True, **measurement.measure()}
        except Skipped as skipped:
            return {"skipped": str(skipped)}
        except Exception as error:  # the other measurements are still valid
            return _failed(error)

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(_finite(row))
        write_json(self.path, {"machine": self._machine, "seconds": self._budget.spent, "rows": self.rows})
        print(_line(self.rows[-1]), flush=True)


def _failed(error: Exception) -> dict[str, Any]:
    is_described = isinstance(error, MeasurementFailed)
    return {"ok": False, "error": str(error) if is_described else f"{type(error).__name__}: {error}"}


def _finite(value: Any) -> Any:
    """``value`` with text in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict[str, Any]) -> str:
    """``row`` as one line for the terminal."""
    state = "skipped" if "skipped" in row else "ok" if row["ok"] else "FAILED"
    values = [
        f"{key}={f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in row.items()
        if key not in ("check", "name", "ok") and not isinstance(value, dict | list)
    ]
    return f"{row['check']}: {row['name']}: {state} {' '.join(values)}"
