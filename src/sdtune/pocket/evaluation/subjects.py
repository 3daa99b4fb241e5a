"""Evaluation of several subjects of pocket's world in one training: is each learned, and are they kept apart?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Interval

from sdtune.backbone import Facts
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.images.grids import grid, save_png
from sdtune.pocket.evaluation import classifier
from sdtune.pocket.evaluation.subject import SubjectMetrics, shares
from sdtune.pocket.world.data import Subject
from sdtune.pocket.world.objects import BACKGROUNDS
from sdtune.pocket.world.scenes import SIDE
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import RunModels, generate_images

_SHOWN = 12
"""Images of each subject in the grids."""


class SubjectsMetrics:
    """Metrics of :class:`~sdtune.pocket.evaluation.subject.SubjectMetrics` for each subject of a mix.

    Each subject is generated under its own word. ``subject_gain/NAME`` is that of the source ``NAME``, and
    ``mixed_up/NAME`` the fraction of its images that the classifier reads as another subject of the mix.
    ``subject_gain``, ``mixed_up``, ``subject_accuracy`` and ``background_accuracy`` are means over the subjects, and
    ``subject_gain_lowest`` is the lowest gain. ``base_subject_accuracy``, ``base_background_accuracy`` and
    ``base_mixed_up`` are those of the base model.

    Args:
        images: number of images of each subject.
        seed: seed of the first image; each next image adds 1.
        sampling: sampling settings.
    """

    def __init__(
        self,
        images: Annotated[int, Ge(1)] = 210,
        seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1000,
        sampling: Sampling | None = None,
    ) -> None:
        self.count, self.seed, self.sampling = images, seed, sampling or Sampling()

    names: tuple[str, ...] = (
        *("subject_gain", "subject_gain_lowest", "mixed_up", "subject_accuracy", "background_accuracy"),
    )
    """Names of the metrics."""

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """Raise UserError if the data is not a mix of subjects, before any weights are loaded."""
        other = next((name for name, part in data.parts.items() if not isinstance(part, Subject)), None)
        if other is not None or len(data.parts) < 2:
            raise UserError(
                f"pocket_subjects needs a mix of pocket's subjects, but {other or 'the data'} is none",
                key="evaluation",
                remedy="use kind: pocket_subject for all sources, or evaluation=clip",
            )
        if facts.side != SIDE:
            raise UserError(
                f"pocket_subjects needs {SIDE}x{SIDE} images, the backbone generates {facts.side}x{facts.side}",
                key="evaluation",
                remedy="use backbone=pocket or evaluation=clip",
            )
        self.sampling.check(facts, "evaluation.sampling")
        each = [f"{metric}/{name}" for name in data.parts for metric in ("subject_gain", "mixed_up")]
        self.names = (*type(self).names, *each)

    def run(self, models: RunModels, data: ImageDataModule, folder: Path) -> dict[str, Any]:
        """Compute the metrics; writes a grid with a row for each subject to ``folder``."""
        subjects = {name: part for name, part in data.parts.items() if isinstance(part, Subject)}
        backgrounds = {name: self._backgrounds(subject) for name, subject in subjects.items()}
        requests = [
            Request(subject.prompt(background, "big"), self.seed + number)
            for name, subject in subjects.items()
            for number, background in enumerate(backgrounds[name])
        ]
        reader = classifier.load_classifier()
        generated = {"base_": models.base_images(requests, self.sampling)}
        single = SubjectMetrics(images=self.count, seed=self.seed, clip=None, sampling=self.sampling)
        with models.trained() as backbone:
            generated[""] = generate_images(backbone, requests, self.sampling)
            ceilings = {
                name: single.ceiling(backbone, reader, subject.subject, list(dict.fromkeys(backgrounds[name])))
                for name, subject in subjects.items()
            }
        readings: dict[str, list[float]] = {}
        for prefix, images in generated.items():
            by_subject = {
                name: images[number * self.count : (number + 1) * self.count] for number, name in enumerate(subjects)
            }
            readings |= {
                f"{prefix}{key}": values
                for name, own in by_subject.items()
                for key, values in _read(own, backgrounds[name], reader, name, subjects).items()
            }
            rows = [own[:_SHOWN] for own in by_subject.values()]
            save_png(
                grid(rows, row_labels=[s.noun for s in subjects.values()]), folder / f"{prefix or 'trained_'}images.png"
            )
        return _means(shares(readings, folder), ceilings)

    def _backgrounds(self, subject: Subject) -> list[str]:
        """Backgrounds of the generated images: those that no training image of ``subject`` has."""
        unseen = [background for background in BACKGROUNDS if background not in subject.backgrounds()]
        return [unseen[number % len(unseen)] for number in range(self.count)]


def _read(
    images: Sequence[np.ndarray], backgrounds: Sequence[str], reader: Any, name: str, subjects: Mapping[str, Subject]
) -> dict[str, list[float]]:
    """For each image of the subject ``name``: whether it shows it, another subject of the mix, and its background."""
    stack = np.stack(images)
    objects = np.array(reader.read(stack).object)
    others = [subject.subject for other, subject in subjects.items() if other != name]
    return {
        f"subject_accuracy/{name}": (objects == subjects[name].subject).tolist(),
        f"mixed_up/{name}": np.isin(objects, others).tolist(),
        f"background_accuracy/{name}": (np.array(classifier.background(stack)) == np.array(backgrounds)).tolist(),
    }


def _means(metrics: dict[str, float], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """``metrics`` with the gain of each subject, and means over the subjects."""
    result: dict[str, Any] = {f"mixed_up/{name}": metrics[f"mixed_up/{name}"] for name in ceilings}
    for key in ("subject_accuracy", "background_accuracy", "mixed_up"):
        for prefix in ("", "base_"):
            result[f"{prefix}{key}"] = fmean(metrics[f"{prefix}{key}/{name}"] for name in ceilings)
    gains = {}
    for name, ceiling in ceilings.items():
        base = metrics[f"base_subject_accuracy/{name}"]
        gains[name] = (metrics[f"subject_accuracy/{name}"] - base) / (ceiling - base) if ceiling > base else 0.0
        result[f"subject_gain/{name}"] = gains[name]
    return {**result, "subject_gain": fmean(gains.values()), "subject_gain_lowest": min(gains.values())}
