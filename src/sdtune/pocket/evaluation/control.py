"""Does an image of the world follow its control map, and still its prompt?

These metrics are of pocket's world and cannot be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge

from sdtune.backbone import Facts, Pretrained
from sdtune.data import ImageDataModule
from sdtune.data.control.base import Computed
from sdtune.errors import UserError
from sdtune.evaluation.agreement import iou, line_f1
from sdtune.evaluation.draw import draw_base, draw_images, trained
from sdtune.images.grids import grid, save_png
from sdtune.pocket.evaluation import classifier
from sdtune.pocket.evaluation.subject import shares
from sdtune.pocket.world.captions import full_caption
from sdtune.pocket.world.control import PocketControl
from sdtune.pocket.world.data import SceneSample
from sdtune.pocket.world.scenes import SIDE, draw_scene, held_out_scenes, mask
from sdtune.sampling.loop import Request, Sampling

NEAR = 2
"""Pixels within which two edges count as the same."""

APART = 40  # where the true masks are found best in true renders
"""Distance in RGB from the background's colour beyond which a pixel counts as the object's."""

_SHOWN = 8  # a row of a grid


class ControlMetrics:
    """On scenes of combinations that training never draws, each from its caption and its own map.

    All are from 0 to 1. ``control_agreement`` compares the map with what is found in the image: for edges the F1 of
    precision and recall within two pixels; for segmentation and depth the IoU of the object's area, found by its
    distance from the border's colour; for pose the IoU of the boxes with the areas' centre and spread.
    ``control_agreement_shuffled`` compares the same images with another scene's map, ``ceiling_control_agreement``
    the true renders with their own. ``background_accuracy`` and ``object_accuracy`` are as in pocket's quality. All
    for the base too (``base_``), which sees the prompt alone.

    Args:
        images: how many are drawn.
        seed: of the scenes and of the first image; the others follow.
        sampling: how.
    """

    def __init__(
        self,
        images: Annotated[int, Ge(2)] = 256,
        seed: Annotated[int, Ge(0)] = 1000,
        sampling: Sampling | None = None,
    ) -> None:
        self.count, self.seed, self.sampling = images, seed, sampling or Sampling()

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """UserError before any weights are loaded."""
        if data.control is None:
            raise UserError(
                "pocket_control compares images with control maps", key="evaluation", remedy="choose data/control=canny"
            )
        if not all(isinstance(sample, SceneSample) for sample in data.train):
            raise UserError(
                "pocket_control measures on pocket's world (data=pocket_world); for one's own images"
                " choose evaluation=clip",
                key="evaluation",
            )
        if self.sampling.size(facts.side) != (SIDE, SIDE):
            raise UserError(f"pocket_control reads {SIDE}x{SIDE} images, others are asked for", key="evaluation")
        self.sampling.check(facts.factor)

    def run(
        self, source: Pretrained, data: ImageDataModule, artifact: Path, name: str, device: torch.device, folder: Path
    ) -> dict[str, Any]:
        """The metrics; grids of what was measured go to ``folder``."""
        control = data.control
        if not isinstance(control, Computed | PocketControl):
            keys = ("control_agreement", "control_agreement_shuffled", "background_accuracy", "object_accuracy")
            both = [*keys, *(f"base_{key}" for key in keys), "ceiling_control_agreement"]
            reason = f"{type(control).__name__} has no map of the scenes that are measured on"
            return {**dict.fromkeys(both), "reasons": dict.fromkeys(both, reason)}
        samples = [SceneSample(scene, full_caption(scene)) for scene in held_out_scenes(self.seed, self.count)]
        maps = [control.map(sample, (SIDE, SIDE)) for sample in samples]
        truth = [expected_area(sample, control) for sample in samples]
        requests = [Request(s.caption, self.seed + i, (m,)) for i, (s, m) in enumerate(zip(samples, maps, strict=True))]
        reader = classifier.load_classifier()
        readings: dict[str, list[float]] = {}
        # The base reads no map, so it draws the same for all of them.
        drawn = {"base_": draw_base(source, [replace(r, maps=()) for r in requests], self.sampling, device)}
        with trained(source, artifact, name, device) as backbone:
            drawn[""] = draw_images(backbone, requests, self.sampling)
        for prefix, images in drawn.items():
            readings[f"{prefix}control_agreement"] = scores(images, truth, control)
            readings[f"{prefix}control_agreement_shuffled"] = scores(images, truth[1:] + truth[:1], control)
            stack = np.stack(images)
            backgrounds, things = [s.scene.background for s in samples], [s.scene.thing for s in samples]
            readings[f"{prefix}background_accuracy"] = _equal(classifier.background(stack), backgrounds)
            readings[f"{prefix}object_accuracy"] = _equal(reader.read(stack).object, things)
            rows = [
                row
                for i in range(0, min(len(images), 4 * _SHOWN), _SHOWN)
                for row in (maps[i : i + _SHOWN], images[i : i + _SHOWN])
            ]
            save_png(grid(rows, ["control", "image"] * (len(rows) // 2)), folder / f"{prefix or 'trained_'}images.png")
        renders = [np.asarray(draw_scene(sample.scene)) for sample in samples]
        readings["ceiling_control_agreement"] = scores(renders, truth, control)
        return dict(shares(readings, folder))


Measured = Computed | PocketControl
"""Controls whose maps can be found again in an image."""


def _equal(said: Sequence[str], truth: Sequence[str]) -> list[float]:
    return [float(a == b) for a, b in zip(said, truth, strict=True)]


def scores(images: Sequence[np.ndarray], truth: Sequence[np.ndarray], control: Measured) -> list[float]:
    """Agreement in [0, 1] of each of ``images`` (uint8 [64, 64, 3]) with what ``truth`` (bool [64, 64]) has."""
    lines = isinstance(control, Computed)
    pairs = [(found(image, control), own) for image, own in zip(images, truth, strict=True)]
    return [line_f1(shown, own, NEAR) if lines else iou(shown, own) for shown, own in pairs]


def expected_area(sample: SceneSample, control: Measured) -> np.ndarray:
    """What an image of ``sample``'s map should show, bool [64, 64]: edges, the object's area or its box."""
    if isinstance(control, Computed):
        edges: np.ndarray = control.map(sample, (SIDE, SIDE))[..., 0] > 0
        return edges
    area: np.ndarray = np.asarray(mask(sample.scene)) > 0
    return box(area) if control.kind == "pose" else area


def found(image: np.ndarray, control: Measured) -> np.ndarray:
    """The same as in :func:`expected_area`, as an image (uint8 [64, 64, 3]) shows it."""
    if isinstance(control, Computed):
        edges: np.ndarray = control.extract(image)[..., 0] > 0
        return edges
    area = object_area(image)
    return box(area) if control.kind == "pose" else area


def object_area(image: np.ndarray) -> np.ndarray:
    """bool [64, 64]: what differs from the border's median colour by more than :data:`APART`."""
    distance = np.linalg.norm(image.astype(float) - classifier.border_colours(image[None])[0], axis=-1)
    area: np.ndarray = distance > APART
    return area


def box(area: np.ndarray) -> np.ndarray:
    """The upright box with the centre and spread of ``area``, filled: a stray pixel does not move it as it would a
    bounding box. A box of side w has the variance w^2 / 12."""
    out = np.zeros_like(area)
    if area.any():
        rows, columns = np.nonzero(area)
        spans = [(c.mean() - 3**0.5 * c.std(), c.mean() + 3**0.5 * c.std()) for c in (rows, columns)]
        out[tuple(slice(max(0, round(low)), round(high) + 1) for low, high in spans)] = True
    return out
