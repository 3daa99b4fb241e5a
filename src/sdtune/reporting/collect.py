"""Read what runs have left in their folders."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from sdtune.errors import UserError
from sdtune.runs.compare import flat, last_start, own_config_folder

_DEPTH = 3
"""So deep below the folder of a report its runs may lie."""


@dataclass(frozen=True)
class SampleImage:
    """One sample that a run has drawn; ``when`` is ``before`` or ``after``."""

    file: Path
    prompt: str
    seed: str
    when: str


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        overrides: of its command line; of its last one, where it was resumed.
        config_folder: the command line's ``-cd``.
        state: ``done``, ``failed``, ``pruned``, or ``unfinished`` where it was stopped, killed, or is still running.
        error: why it failed.
        config: the composed config, flat: dotted key -> value.
        metrics: the numbers of ``metrics.json``; empty where it is not complete.
        reasons: why a metric is null.
        history: the rows of ``metrics.csv``.
        images: single samples.
        sheets: further grids that it has drawn, by name.
    """

    folder: Path
    overrides: tuple[str, ...]
    config_folder: str | None
    state: str
    error: str | None
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    reasons: Mapping[str, str]
    history: tuple[Mapping[str, float], ...]
    images: tuple[SampleImage, ...]
    sheets: Mapping[str, Path]


def collect(folder: Path) -> list[Run]:
    """The run in ``folder``, or the runs below it, in their folders' order; UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", remedy="name that of a run or of a sweep")
    if (folder / ".hydra" / "config.yaml").is_file():
        return [_read(folder)]
    patterns = ["/".join(["*"] * depth) + "/.hydra/config.yaml" for depth in range(1, _DEPTH + 1)]
    found = sorted({file.parents[1] for pattern in patterns for file in folder.glob(pattern)}, key=_order)
    runs = [path for path in found if (path / "metrics.csv").exists() or (path / "job.json").exists()]
    if not runs:
        raise UserError(f"{folder} holds no training run", remedy="name the folder of a run or of a sweep")
    return [_read(path) for path in runs]


def _order(folder: Path) -> tuple[Any, ...]:
    return (folder.parent, int(folder.name) if folder.name.isdigit() else -1, folder.name)


def _read(folder: Path) -> Run:
    figures = _json(folder / "metrics.json")
    job = _json(folder / "job.json")
    # A job that failed may have been completed by itself since.
    state = "done" if figures else str(job.get("state", "unfinished"))
    last = last_start(folder)
    # Resolved, or what was typed would differ from the same value by an interpolation.
    config = OmegaConf.to_container(OmegaConf.load(last / "config.yaml"), resolve=True)
    kept = last / "overrides.yaml"
    overrides = [str(o) for o in OmegaConf.load(kept)] if kept.is_file() else []
    return Run(
        folder=folder,
        overrides=tuple(o for o in overrides if not o.startswith("resume=")),
        config_folder=own_config_folder(folder),
        state=state,
        error=None if figures else job.get("error"),
        config=flat(config),
        metrics={k: float(v) for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)},
        reasons=figures.get("reasons", {}),
        history=tuple(_rows(folder / "metrics.csv")),
        images=tuple(_images(folder)),
        sheets={file.stem: file for file in sorted((folder / "evaluation").glob("*.png"))},
    )


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content


def _rows(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]  # a process that is writing, or was killed at it, leaves a torn line
    return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(io.StringIO(whole))]


def _images(folder: Path) -> list[SampleImage]:
    found = []
    for when in ("before", "after"):
        for file in sorted((folder / "samples" / when).glob("*.png")):
            try:
                with Image.open(file) as image:
                    image.load()
                    about = image.info
            except OSError:
                continue  # torn, or of another program: the other images are still worth a report
            found.append(SampleImage(file, str(about.get("prompt", "")), str(about.get("seed", "")), when))
    return found
