"""Evaluation of a style trained on pocket's world: style and object accuracy.

The metrics are specific to pocket's world and not comparable with published ones.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Interval

from sdtune import streams
from sdtune.backbone import Facts
from sdtune.data.datamodule import ImageDataModule
from sdtune.errors import UserError
from sdtune.evaluation.strengths import strength_grid
from sdtune.images.grids import grid, save_png
from sdtune.pocket.evaluation import classifier
from sdtune.pocket.evaluation.psnr import psnr
from sdtune.pocket.evaluation.subject import shares
from sdtune.pocket.world.objects import BACKGROUNDS
from sdtune.pocket.world.scenes import SIDE, Scene, compose_scene, draw_scene
from sdtune.pocket.world.style import STYLE, Style, drawn
from sdtune.randomness import generator
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import RunModels, generate_images

log = logging.getLogger("sdtune")

_ROWS, _COLUMNS = 6, 13
"""Maximum number of rows and columns of an image grid."""


class StyleMetrics:
    """Style, object and background accuracy on objects that training did not show in the style.

    ``style_accuracy``: fraction of images that the classifier reads as the style. ``object_accuracy`` and
    ``background_accuracy``: fraction of images with the object and the background of the prompt. All objects are big.
    ``base_...``: the same for the base model. ``shown_...``: the same on objects that training showed; the difference
    tells how well the style generalizes. ``vae_psnr_db``: PSNR of the VAE's reconstruction of true renders of the
    objects that training did not show.

    The classifier knows one drawing of each object in each style. A style's drawing of an object also differs in view
    and shape, which a model cannot infer for an object that training did not show.

    Args:
        objects: number of objects that training did not show.
        seeds: images per object.
        seed: seed of the first image; each next image adds 1.
        sampling: sampling settings.
    """

    def __init__(
        self,
        objects: Annotated[int, Ge(1)] = 26,
        seeds: Annotated[int, Ge(1)] = 8,
        seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1000,
        sampling: Sampling | None = None,
    ) -> None:
        self.objects, self.seeds, self.seed = objects, seeds, seed
        self.sampling = sampling or Sampling()

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """Raise UserError if the settings cannot be evaluated, before any weights are loaded."""
        if not isinstance(data, Style):
            raise UserError(
                "pocket_style needs data=pocket_style",
                key="evaluation",
                remedy="use evaluation=clip for other images",
            )
        left = len(drawn()) - data.objects
        if self.objects > left:
            raise UserError(
                f"max {left} with data.objects={data.objects}, got {self.objects}", key="evaluation.objects"
            )
        if self.sampling.size(facts.side) != (SIDE, SIDE):
            raise UserError(
                f"pocket_style needs {SIDE}x{SIDE} images, but another size is configured",
                key="evaluation",
                remedy="use backbone=pocket without evaluation.sampling.width and height",
            )
        self.sampling.check(facts, "evaluation.sampling")

    def scenes(self, data: Style, shown: bool) -> list[Scene]:
        """Scenes of the objects that training showed (``shown``) or did not show; the same number of both."""
        things = drawn()[: data.objects] if shown else drawn()[data.objects : data.objects + self.objects]
        colours, rng = list(BACKGROUNDS), generator(self.seed, streams.EVALUATION_STYLE)
        rounds = [divmod(number, len(things)) for number in range(self.objects * self.seeds)]
        pairs = [(things[i].name, colours[(i + k) % len(colours)]) for k, i in rounds]
        return [compose_scene(name, background, "big", "in the middle", rng, STYLE) for name, background in pairs]

    def run(self, models: RunModels, data: ImageDataModule, folder: Path) -> dict[str, Any]:
        """Compute the metrics; writes grids of the measured images to ``folder``."""
        assert isinstance(data, Style)
        scenes, shown_scenes = self.scenes(data, False), self.scenes(data, True)
        requests, shown_requests = (
            [Request(data.caption(scene), self.seed + i) for i, scene in enumerate(s)] for s in (scenes, shown_scenes)
        )
        renders = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
        images = {"base_": models.base_images(requests, self.sampling)}
        per_image: dict[str, list[float]] = {}
        with models.trained() as backbone:
            generated = generate_images(backbone, [*requests, *shown_requests], self.sampling)
            per_image["vae_psnr_db"] = reconstruction_psnr(backbone.vae, renders)
        with models.base() as backbone:
            per_image["base_vae_psnr_db"] = reconstruction_psnr(backbone.vae, renders)
        strength_grid(models, requests, self.sampling, folder)
        reader = classifier.load_classifier()
        images |= {"": generated[: len(scenes)], "shown_": generated[len(scenes) :]}
        for prefix, group in images.items():
            expected = shown_scenes if prefix == "shown_" else scenes
            stack = np.stack(group)
            readings = reader.read(stack)
            per_image[f"{prefix}style_accuracy"] = [label == STYLE for label in readings.style]
            triples = zip(readings.object, classifier.background(stack), expected, strict=True)
            correct = [(thing == scene.thing, colour == scene.background) for thing, colour, scene in triples]
            per_image[f"{prefix}object_accuracy"] = [thing for thing, _ in correct]
            per_image[f"{prefix}background_accuracy"] = [colour for _, colour in correct]
            objects = len({scene.thing for scene in expected})
            columns = min(objects, _COLUMNS)
            rows = [group[i : i + columns] for i in range(0, len(group), objects)][:_ROWS]
            log.info("%simages.png: shows %d of %d images", prefix or "trained_", sum(map(len, rows)), len(group))
            labels = [scene.thing for scene in expected[:columns]]
            save_png(grid(rows, column_labels=labels), folder / f"{prefix or 'trained_'}images.png")
        return dict(shares(per_image, folder))


def reconstruction_psnr(vae: Any, renders: np.ndarray) -> list[float]:
    """PSNR in dB of the VAE's reconstruction of each of ``renders``."""
    device = vae.device
    try:
        return [float(value) for value in psnr(classifier.reconstruct(vae.cpu(), renders), renders)]
    finally:
        vae.to(device)
