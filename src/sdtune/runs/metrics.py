"""Metrics of a run: which are better if lower, how they are written and displayed."""

from __future__ import annotations

import csv
import io
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.errors import UserError

LOWER_IS_BETTER = frozenset(
    {"validation_loss", "prior_leak", "prior_drift", "memorisation", "median_step_seconds", "peak_memory_bytes"}
    | {"artifact_bytes", "trainable_parameters", "control_agreement_shuffled", "seconds", "seconds_to_best", "steps"}
    | {"mixed_up"}
)

HIGHER_IS_BETTER = frozenset(
    {"clip_image", "clip_text", "dino_image", "diversity", "control_agreement", "images_per_second", "subject_gain"}
    | {"subject_gain_lowest"}
    | {"subject_accuracy", "background_accuracy", "style_accuracy", "object_accuracy"}
)

SHARES = frozenset(
    {"subject_accuracy", "background_accuracy", "subject_gain", "style_accuracy", "object_accuracy", "prior_leak"}
    | {"subject_gain_lowest", "mixed_up"}
)
"""Metrics that are shares of n images; their resolution is 1/n."""

DESCRIPTIONS = {
    "validation_loss": "diffusion loss on held-out images, with fixed noise and timesteps",
    "validation_step": "optimizer step of the lowest validation loss",
    "clip_image": "CLIP similarity of generated images and training images, -1 to 1 (CLIP-I)",
    "clip_text": "CLIP similarity of generated images and their prompts, -1 to 1 (CLIP-T)",
    "dino_image": "DINO similarity of generated images and training images, -1 to 1",
    "diversity": "mean cosine distance between generated images: 0 if all are identical",
    "memorisation": "mean CLIP similarity to the nearest training image: 1 is a copy",
    "prior_drift": "distance of class images from those of the base model: 0 is unchanged",
    "prior_leak": "share of images of the class alone that show the subject: 0 is best",
    "class_diversity": "distances between class images, relative to the base model: 1 is unchanged",
    "control_agreement": "agreement of the control map with the map of the generated image, 0 to 1",
    "control_agreement_shuffled": "the same with the map of another image: the agreement by chance",
    "subject_accuracy": "share of images that the classifier recognizes as the subject",
    "subject_gain": "subject_accuracy on a scale where the base model is 0 and the upper limit is 1",
    "subject_gain_lowest": "subject_gain of the subject of a mix that is learned least",
    "mixed_up": "share of images under the word of one subject that show another subject of the mix: 0 is best",
    "background_accuracy": "share of images with the requested background color",
    "style_accuracy": "share of images in the style",
    "object_accuracy": "share of images that show the requested object",
    "steps": "optimizer steps of the training",
    "trainable_parameters": "number of trained values",
    "artifact_bytes": "size of the artifact's files",
    "peak_memory_bytes": "largest memory of the training process, or of the GPU",
    "median_step_seconds": "median time of an optimizer step",
    "images_per_second": "training images per second",
    "seconds_to_best": "time until the lowest validation loss",
    "shared_with": "number of runs that trained at the same time on one backbone",
}
"""What each metric is, in one line."""

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


def cut_metrics(file: Path, step: int, *, keep_validation: bool = True) -> list[str]:
    """Remove the rows of ``metrics.csv`` after ``step``, which a resumed run writes again; returns the columns.

    A file without header has no columns.

    The rows are in the order of their steps, so the first row to remove is found by bisection: a file of a million rows
    is cut in a fraction of a second.

    Args:
        keep_validation: False: also remove the rows of ``step`` that have a validation loss.

    Raises:
        UserError: the file is damaged.
    """
    with file.open("rb+") as handle:
        content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
        try:
            header = content[: content.find(b"\n") + 1].decode()
            if not header:  # of a process that was killed before its first row
                return []
            columns = header.strip().split(",")
            first = _cut_at(content, len(header), columns, step, keep_validation=keep_validation)
        except ValueError as error:
            raise UserError(
                f"{file} is damaged ({error})",
                key="resume",
                remedy="restore it from a copy, or delete it to lose its rows",
            ) from error
        finally:
            if isinstance(content, mmap.mmap):
                content.close()
        handle.truncate(first)
    return columns


def _cut_at(content: mmap.mmap | bytes, first: int, columns: list[str], step: int, *, keep_validation: bool) -> int:
    """Offset of the first row to remove; rows begin at the offset ``first``."""
    end = content.rfind(b"\n") + 1
    if columns[0] != "step":
        raise ValueError("the first column is not step")
    last = content.rfind(b"\n", first - 1, end - 1) + 1
    if end > first and content[last:end].count(b",") != len(columns) - 1:
        raise ValueError("a row has other columns than the table")
    if end > first and int(content[last : content.find(b",", last)]) <= step and keep_validation:
        return end  # nothing to remove, only an incomplete line
    commas, rows = 0, 0
    for begin in range(first, end, _BLOCK):
        block = content[begin : min(begin + _BLOCK, end)]
        commas, rows = commas + block.count(b","), rows + block.count(b"\n")
    if commas != (len(columns) - 1) * rows:
        raise ValueError("a row has other columns than the table")
    cut = _first_row_after(content, first, end, step)
    return cut if keep_validation else _without_validation(content, first, cut, columns, step)


_BLOCK = 2**20


def _first_row_after(content: mmap.mmap | bytes, first: int, end: int, step: int) -> int:
    """Offset of the first row, between the offsets ``first`` and ``end``, whose step is larger than ``step``."""
    low, high = first, end
    while low < high:
        row = content.rfind(b"\n", first - 1, (low + high) // 2) + 1
        next_row = content.find(b"\n", row) + 1
        if int(content[row : content.find(b",", row)]) <= step:
            low = next_row
        else:
            high = row
    return low


def _without_validation(content: mmap.mmap | bytes, first: int, end: int, columns: list[str], step: int) -> int:
    """Offset before the last rows, up to ``end``, that have a validation loss of ``step``."""
    while end > first:
        row = content.rfind(b"\n", first - 1, end - 1) + 1
        values = dict(zip(columns, content[row:end].decode().strip("\n").split(","), strict=True))
        if int(values["step"]) != step or not values.get("validation_loss"):
            break
        end = row
    return end


Curve = tuple[list[int], list[float]]
"""Steps and values of a column of ``metrics.csv``."""


def read_curves(file: Path) -> dict[str, Curve]:
    """The columns of ``metrics.csv`` without their empty cells, for charts of many runs.

    Raises:
        UserError: the file is damaged.
    """
    text = file.read_text(encoding="utf-8", errors="replace")
    header, *rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
    if not header:
        return {}  # the run has just started
    curves: dict[str, Curve] = {name: ([], []) for name in header if name != "step"}
    try:
        position = header.index("step")
        for row in rows:
            step = int(row[position])
            for name, value in zip(header, row, strict=True):
                if value and name != "step":
                    curves[name][0].append(step)
                    curves[name][1].append(float(value))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error})", remedy="restore it from a copy, or delete it") from error
    return curves


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
