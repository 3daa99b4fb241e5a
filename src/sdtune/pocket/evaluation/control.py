"""Evaluation of ControlNets on pocket's world: agreement with the control map and with the prompt.

The metrics are specific to pocket's world and not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Interval

from sdtune.backbone import Facts
from sdtune.data import ImageDataModule
from sdtune.data.control.base import Computed
from sdtune.errors import UserError
from sdtune.evaluation.agreement import iou, line_f1
from sdtune.images.grids import grid, save_png
from sdtune.pocket.evaluation import classifier
from sdtune.pocket.evaluation.subject import shares
from sdtune.pocket.world.captions import full_caption
from sdtune.pocket.world.control import PocketControl
from sdtune.pocket.world.data import SceneSample
from sdtune.pocket.world.scenes import SIDE, draw_scene, held_out_scenes, mask
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import RunModels

NEAR = 2
"""Distance in pixels up to which edge pixels match."""

APART = 40  # recovers the true masks best from true renders
"""RGB distance from the background color above which a pixel belongs to the object."""

_GRID_COLUMNS = 8


class ControlMetrics:
    """Metrics of a ControlNet on held-out scenes, each generated from its caption and its control map.

    The scenes have combinations of object, background and size that training never shows. All metrics are in [0, 1].
    ``control_agreement`` compares the map with the same kind of map extracted from the image. Edges: F1 score of the
    edge pixels, matched within two pixels. Segmentation and depth: IoU of the object's area, which is found by its
    distance from the border color. Pose: IoU of the boxes with the center and spread of those areas.
    ``control_agreement_shuffled`` compares the same images with the map of another scene,
    ``ceiling_control_agreement`` compares true renders with their own map. ``background_accuracy`` and
    ``object_accuracy``: fraction of images with the background and the object of the caption. ``base_...``: the same
    for the base model, which receives only the prompt.

    Args:
        images: number of images.
        seed: seed of the scenes and of the first image; each next image adds 1.
        sampling: sampling settings.
    """

    def __init__(
        self,
        images: Annotated[int, Ge(2)] = 256,
        seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1000,
        sampling: Sampling | None = None,
    ) -> None:
        self.count, self.seed, self.sampling = images, seed, sampling or Sampling()

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """Raise UserError if the settings cannot be evaluated, before any weights are loaded."""
        if data.control is None:
            raise UserError(
                "pocket_control needs control maps",
                key="evaluation",
                remedy="set data/control, for example data/control=canny",
            )
        if not all(isinstance(sample, SceneSample) for sample in data.train):
            raise UserError(
                "pocket_control needs data=pocket_world",
                key="evaluation",
                remedy="use evaluation=clip for other images",
            )
        if self.sampling.size(facts.side) != (SIDE, SIDE):
            raise UserError(
                f"pocket_control needs {SIDE}x{SIDE} images, but another size is configured",
                key="evaluation",
                remedy="use backbone=pocket without evaluation.sampling.width and height",
            )
        self.sampling.check(facts, "evaluation.sampling")

    def run(self, models: RunModels, data: ImageDataModule, folder: Path) -> dict[str, Any]:
        """Compute the metrics; writes grids of the measured images to ``folder``."""
        control = data.control
        if not isinstance(control, Computed | PocketControl):
            keys = ("control_agreement", "control_agreement_shuffled", "background_accuracy", "object_accuracy")
            all_keys = [*keys, *(f"base_{key}" for key in keys), "ceiling_control_agreement"]
            reason = f"{type(control).__name__} cannot compute maps of the evaluation scenes"
            return {**dict.fromkeys(all_keys), "reasons": dict.fromkeys(all_keys, reason)}
        samples = [SceneSample(scene, full_caption(scene)) for scene in held_out_scenes(self.seed, self.count)]
        maps = [control.map(sample, (SIDE, SIDE)) for sample in samples]
        truth = [expected_area(sample, control) for sample in samples]
        requests = [
            Request(s.caption, self.seed + i, {"control": m})
            for i, (s, m) in enumerate(zip(samples, maps, strict=True))
        ]
        reader = classifier.load_classifier()
        readings: dict[str, list[float]] = {}
        # Without control maps, the base model's cached images serve all runs.
        generated = {"base_": models.base_images([replace(r, conditions={}) for r in requests], self.sampling)}
        generated[""] = models.trained_images(requests, self.sampling)
        for prefix, images in generated.items():
            readings[f"{prefix}control_agreement"] = scores(images, truth, control)
            readings[f"{prefix}control_agreement_shuffled"] = scores(images, truth[1:] + truth[:1], control)
            stack = np.stack(images)
            backgrounds, things = [s.scene.background for s in samples], [s.scene.thing for s in samples]
            readings[f"{prefix}background_accuracy"] = _matches(classifier.background(stack), backgrounds)
            readings[f"{prefix}object_accuracy"] = _matches(reader.read(stack).object, things)
            rows = [
                row
                for i in range(0, min(len(images), 4 * _GRID_COLUMNS), _GRID_COLUMNS)
                for row in (maps[i : i + _GRID_COLUMNS], images[i : i + _GRID_COLUMNS])
            ]
            save_png(grid(rows, ["control", "image"] * (len(rows) // 2)), folder / f"{prefix or 'trained_'}images.png")
        renders = [np.asarray(draw_scene(sample.scene)) for sample in samples]
        readings["ceiling_control_agreement"] = scores(renders, truth, control)
        return dict(shares(readings, folder))


Measured = Computed | PocketControl
"""Controls whose maps can be extracted from a generated image."""


def _matches(predicted: Sequence[str], truth: Sequence[str]) -> list[float]:
    return [float(a == b) for a, b in zip(predicted, truth, strict=True)]


def scores(images: Sequence[np.ndarray], truth: Sequence[np.ndarray], control: Measured) -> list[float]:
    """Agreement in [0, 1] of each of ``images`` (uint8 [64, 64, 3]) with its true area or edges (bool [64, 64])."""
    has_edges = isinstance(control, Computed)
    pairs = [(found(image, control), expected) for image, expected in zip(images, truth, strict=True)]
    return [line_f1(actual, expected, NEAR) if has_edges else iou(actual, expected) for actual, expected in pairs]


def expected_area(sample: SceneSample, control: Measured) -> np.ndarray:
    """Ground truth for an image of ``sample``, bool [64, 64]: edges, the object's area or its box."""
    if isinstance(control, Computed):
        edges: np.ndarray = control.map(sample, (SIDE, SIDE))[..., 0] > 0
        return edges
    area: np.ndarray = np.asarray(mask(sample.scene)) > 0
    return box(area) if control.kind == "pose" else area


def found(image: np.ndarray, control: Measured) -> np.ndarray:
    """Counterpart of :func:`expected_area`, extracted from an image (uint8 [64, 64, 3])."""
    if isinstance(control, Computed):
        edges: np.ndarray = control.extract(image)[..., 0] > 0
        return edges
    area = object_area(image)
    return box(area) if control.kind == "pose" else area


def object_area(image: np.ndarray) -> np.ndarray:
    """Object mask, bool [64, 64]: pixels that differ from the border's median color by more than :data:`APART`."""
    distance = np.linalg.norm(image.astype(float) - classifier.border_colours(image[None])[0], axis=-1)
    area: np.ndarray = distance > APART
    return area


def box(area: np.ndarray) -> np.ndarray:
    """Filled axis-aligned box with the center and spread of ``area``; stray pixels move it less than a bounding box.

    A box of side w has the variance w^2 / 12.
    """
    out = np.zeros_like(area)
    if area.any():
        rows, columns = np.nonzero(area)
        spans = [(c.mean() - 3**0.5 * c.std(), c.mean() + 3**0.5 * c.std()) for c in (rows, columns)]
        out[tuple(slice(max(0, round(low)), round(high) + 1) for low, high in spans)] = True
    return out
