"""Metrics of a run: which are better if lower, how they are written and displayed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.errors import UserError

LOWER_IS_BETTER = frozenset(
    {"validation_loss", "prior_leak", "prior_drift", "memorisation", "median_step_seconds", "peak_memory_bytes"}
    | {"artifact_bytes", "trainable_parameters", "control_agreement_shuffled", "seconds", "seconds_to_best", "steps"}
)

SHARES = frozenset(
    {"subject_accuracy", "background_accuracy", "subject_gain", "style_accuracy", "object_accuracy", "prior_leak"}
)
"""Metrics that are shares of n images; their resolution is 1/n."""

OF_TRAINING = (
    *("steps", "validation_loss", "validation_step", "trainable_parameters", "artifact_bytes"),
    *("peak_memory_bytes", "median_step_seconds", "images_per_second", "seconds_to_best"),
)
"""Metrics of ``metrics.json`` from the training; ``sdtune evaluate`` does not recompute them."""


@dataclass(frozen=True)
class MetricsTable:
    """``metrics.csv`` of a run: the names of the columns, and the rows, whose values are numbers or empty."""

    columns: list[str]
    rows: list[dict[str, str]]


def read_metrics(file: Path, key: str | None = None) -> MetricsTable:
    """Read ``metrics.csv``; an incomplete last line, which a process leaves that is killed or still writes, is ignored.

    Args:
        file: the file.
        key: config key of the run folder, for errors.

    Raises:
        UserError: the file is damaged.
    """
    try:
        text = file.read_text(encoding="utf-8")
        complete_lines = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(complete_lines), strict=True)
        rows = list(reader)
        for row in rows:
            _check_row(row)
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{file} is damaged ({error})", key=key, remedy="restore it from a copy, or delete it to lose its rows"
        ) from error
    return MetricsTable(list(reader.fieldnames or []), rows)


def _check_row(row: Mapping[str, Any]) -> None:
    """Raise ValueError if a row has too many or too few values, no step, or a value that is not a number."""
    values = list(row.values())
    if None in row or None in values or "step" not in row:
        raise ValueError("a row has other columns than the table")
    numbers = [int(row["step"]), *(float(value) for value in values if value)]
    if numbers[0] < 1:
        raise ValueError("a row has a step below 1")


def finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON lacks, by null and add a reason."""
    not_finite = [key for key, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    reasons = {**metrics.get("reasons", {}), **dict.fromkeys(not_finite, "not finite")}
    return {**metrics, **dict.fromkeys(not_finite), "reasons": reasons} if not_finite else metrics


def unit(value: float, metric: str, digits: int = 4) -> str:
    """Format ``value`` with the unit of ``metric``; numbers without unit get ``digits`` significant digits."""
    if metric.endswith("_bytes"):
        return f"{value / 1024**2:,.2f} MiB" if value < 10 * 1024**2 else f"{value / 1024**2:,.0f} MiB"
    if metric == "seconds" or metric.startswith("seconds_"):
        return f"{value:,.0f} s"
    if metric in ("trainable_parameters", "steps"):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
