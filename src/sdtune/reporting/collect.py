"""Read the files of finished, failed and unfinished runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sdtune.errors import UserError
from sdtune.files import is_locked, read_json, read_saved_yaml
from sdtune.progress import track
from sdtune.reporting.images import UNREADABLE
from sdtune.runs.compare import flat, last_start, saved_config_dir
from sdtune.runs.hydra_values import of_environment, resolved_config, saved_overrides
from sdtune.runs.layout import TRAINING_IMAGES
from sdtune.runs.metrics import Curve, read_curves

_DEPTH = 3
"""Maximum depth of run folders below the folder of a report."""


@dataclass(frozen=True)
class SampleImage:
    """Sample image of a run after ``step`` optimizer steps; 0: before the training."""

    file: Path
    prompt: str
    seed: str
    step: int


@dataclass(frozen=True)
class TrainingData:
    """Training images of a run: their numbers by kind, and files and captions of the first ones."""

    counts: Mapping[str, int]
    shown: tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class Run:
    """Content of a run folder.

    Attributes:
        overrides: overrides of its command line; of the last one if it was resumed.
        config_folder: the ``--config-dir`` of its command line.
        state: ``done``, ``failed``, ``pruned``, ``running``, or ``unfinished`` (stopped or killed).
        error: why it failed.
        config: the composed config, flat: dotted key -> value.
        metrics: numbers of ``metrics.json``; empty if the run is not complete.
        reasons: metric -> why it is null.
        curves: columns of ``metrics.csv``.
        images: single samples, in the order of their steps.
        sheets: image grids of the evaluation, by name.
        training: the training images.
        started: time of the start, in seconds since 1970; None if unknown.
        finished: time of the last change of the metrics, likewise.
    """

    folder: Path
    overrides: tuple[str, ...]
    config_folder: str | None
    state: str
    error: str | None
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    reasons: Mapping[str, str]
    curves: Mapping[str, Curve]
    images: tuple[SampleImage, ...]
    sheets: Mapping[str, Path]
    training: TrainingData = field(default_factory=lambda: TrainingData({}, ()))
    started: float | None = None
    finished: float | None = None

    def first_images(self) -> list[SampleImage]:
        """Samples of the base model, before the training."""
        return [image for image in self.images if image.step == 0]

    def last_images(self) -> list[SampleImage]:
        """Samples after the training, or of the last step so far."""
        last = max((image.step for image in self.images), default=0)
        return [image for image in self.images if image.step == last > 0]


def collect(folder: Path) -> list[Run]:
    """Read the run in ``folder``, or all runs below it, sorted by folder; damaged ones are left out with a line.

    Raises:
        UserError: ``folder`` does not exist, has no training run, or is a damaged one.
    """
    folders = run_folders(folder)
    if folders == [folder]:
        return [read_run(folder)]
    read = (_readable(path) for path in folders)
    runs = [run for run in track("Reading runs", read, len(folders)) if run is not None]
    if not runs:
        raise UserError(f"no readable run in {folder}", remedy="use the folder of a run or of a sweep")
    return runs


def _readable(folder: Path) -> Run | None:
    """The run in ``folder``; None, with a line on stderr, if a file of it is damaged."""
    try:
        return read_run(folder)
    except UserError as error:
        print(f"sdtune: {error}; the report leaves {folder} out", file=sys.stderr)
        return None


def run_folders(folder: Path) -> list[Path]:
    """``folder`` if it is a run, else the runs below it.

    Raises:
        UserError: ``folder`` does not exist or has no training run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", remedy="use the folder of a run or of a sweep")
    if (folder / ".hydra" / "config.yaml").is_file():
        return [folder]
    patterns = ["/".join(["*"] * depth) + "/.hydra/config.yaml" for depth in range(1, _DEPTH + 1)]
    folders = sorted({file.parents[1] for pattern in patterns for file in folder.glob(pattern)}, key=_order)
    runs = [path for path in folders if (path / "metrics.csv").exists() or (path / "job.json").exists()]
    if not runs:
        raise UserError(f"no training run in {folder}", remedy="use the folder of a run or of a sweep")
    return runs


def _order(folder: Path) -> tuple[Any, ...]:
    return (folder.parent, int(folder.name) if folder.name.isdigit() else -1, folder.name)


def read_run(folder: Path) -> Run:
    """Read the run in ``folder``."""
    metrics = _json(folder / "metrics.json")
    job = _json(folder / "job.json")
    # A failed job may have been completed later, as a single run.
    state = "done" if metrics else str(job.get("state", "running" if is_locked(folder) else "unfinished"))
    last = last_start(folder)
    # Resolve interpolations, so that equal values compare as equal.
    config = flat(resolved_config(last, read=read_saved_yaml)) | of_environment(last)
    saved = last / "overrides.yaml"
    overrides = saved_overrides(last) if saved.is_file() else []
    log = folder / "metrics.csv"
    return Run(
        folder=folder,
        overrides=tuple(o for o in overrides if not o.startswith("resume=")),
        config_folder=saved_config_dir(folder),
        state=state,
        error=None if metrics else job.get("error"),
        config=config,
        metrics={k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)},
        reasons=reasons if isinstance(reasons := metrics.get("reasons"), dict) else {},
        curves=read_curves(log) if log.is_file() else {},
        images=tuple(sorted(_images(folder), key=lambda image: image.step)),
        sheets={file.stem: file for file in sorted((folder / "evaluation").glob("*.png"))},
        training=_training_images(folder / TRAINING_IMAGES),
        started=_time(folder / ".hydra" / "config.yaml"),
        finished=_time(folder / "metrics.json") or _time(log),
    )


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _time(file: Path) -> float | None:
    return file.stat().st_mtime if file.is_file() else None


def _training_images(folder: Path) -> TrainingData:
    content = _json(folder / "images.json")
    counts = {key: value for key in _COUNTS if isinstance(value := content.get(key, 0), int)}
    shown = [
        entry for entry in content.get("shown", ()) if isinstance(entry, dict) and isinstance(entry.get("file"), str)
    ]
    # A run folder may come from others: only files in this folder are shown.
    files = tuple((folder / Path(entry["file"]).name, str(entry.get("caption", ""))) for entry in shown)
    return TrainingData(counts if content else {}, files)


_COUNTS = ("images", "validation_images", "class_images")


def _images(folder: Path) -> Iterator[SampleImage]:
    for file in sorted((folder / "samples").glob("step*/*.png")):
        step = file.parent.name.removeprefix("step")
        if not step.isdigit():
            continue
        try:
            with Image.open(file) as image:
                metadata = image.info
        except UNREADABLE:
            continue  # skip an incomplete file; report the other images
        yield SampleImage(file, str(metadata.get("prompt", "")), str(metadata.get("seed", "")), int(step))
