"""Is an image in the style that pocket has never seen, and still of its object?

These metrics are of pocket's world and cannot be compared with published ones.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge

from sdtune import streams
from sdtune.backbone import Facts, Pretrained
from sdtune.data.datamodule import ImageDataModule
from sdtune.errors import UserError
from sdtune.evaluation.draw import draw_base, draw_images, trained
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

log = logging.getLogger("sdtune")

_ROWS, _COLUMNS = 6, 13
"""Images of a grid at most."""


class StyleMetrics:
    """Is the image in the style, and still of the object that was asked for, where the object was not shown?

    ``style_accuracy``: share of images that the measuring classifier reads as the style; ``object_accuracy`` and
    ``background_accuracy``: share of which the object, the background is the prompt's. Big objects that training never
    showed in the style; for the base too (``base_``). ``shown_style_accuracy`` and ``shown_object_accuracy`` are the
    same on objects that it did show: what was learned, apart from how far it carries. ``vae_psnr_db``: how well the
    VAE rebuilds true renders of the unseen ones.

    The classifier knows one drawing of each object in each style, and a drawing of a style's own is more than its
    strokes: views and shapes differ as well, which nobody can guess of an object that was not shown.

    Args:
        objects: how many of those that were not shown.
        seeds: images of each.
        seed: of the first image; the others follow.
        sampling: how.
    """

    def __init__(
        self,
        objects: Annotated[int, Ge(1)] = 26,
        seeds: Annotated[int, Ge(1)] = 8,
        seed: Annotated[int, Ge(0)] = 1000,
        sampling: Sampling | None = None,
    ) -> None:
        self.objects, self.seeds, self.seed = objects, seeds, seed
        self.sampling = sampling or Sampling()

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """UserError before any weights are loaded."""
        if not isinstance(data, Style):
            raise UserError(
                "pocket_style measures a style of pocket's world (data=pocket_style); for one's own"
                " images choose evaluation=clip",
                key="evaluation",
            )
        left = len(drawn()) - data.objects
        if self.objects > left:
            raise UserError(f"{self.objects}, but data.objects={data.objects} leaves {left}", key="evaluation.objects")
        if self.sampling.size(facts.side) != (SIDE, SIDE):
            raise UserError(f"pocket_style reads {SIDE}x{SIDE} images, others are asked for", key="evaluation")
        self.sampling.check(facts.factor)

    def scenes(self, data: Style, shown: bool) -> list[Scene]:
        """Of objects that training shows, or of the next ones; as many of both."""
        things = drawn()[: data.objects] if shown else drawn()[data.objects : data.objects + self.objects]
        colours, rng = list(BACKGROUNDS), generator(self.seed, streams.EVALUATION_STYLE)
        rounds = [divmod(number, len(things)) for number in range(self.objects * self.seeds)]
        pairs = [(things[i].name, colours[(i + k) % len(colours)]) for k, i in rounds]
        return [compose_scene(name, background, "big", "in the middle", rng, STYLE) for name, background in pairs]

    def run(
        self, source: Pretrained, data: ImageDataModule, artifact: Path, name: str, device: torch.device, folder: Path
    ) -> dict[str, Any]:
        """The metrics; grids of what was measured go to ``folder``."""
        assert isinstance(data, Style)
        scenes, shown = self.scenes(data, False), self.scenes(data, True)
        requests, more = (
            [Request(data.caption(scene), self.seed + i) for i, scene in enumerate(s)] for s in (scenes, shown)
        )
        renders = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
        images = {"base_": draw_base(source, requests, self.sampling, device)}
        single: dict[str, list[float]] = {}
        with trained(source, artifact, name, device) as backbone:
            both = draw_images(backbone, [*requests, *more], self.sampling)
            single["vae_psnr_db"] = reconstruction_psnr(backbone.vae, renders)
        single["base_vae_psnr_db"] = reconstruction_psnr(source.load().vae, renders)
        reader = classifier.load_classifier()
        images |= {"": both[: len(scenes)], "shown_": both[len(scenes) :]}
        for prefix, found in images.items():
            asked = shown if prefix == "shown_" else scenes
            stack = np.stack(found)
            readings = reader.read(stack)
            single[f"{prefix}style_accuracy"] = [said == STYLE for said in readings.style]
            said = zip(readings.object, classifier.background(stack), asked, strict=True)
            right = [(thing == scene.thing, colour == scene.background) for thing, colour, scene in said]
            single[f"{prefix}object_accuracy"] = [thing for thing, _ in right]
            single[f"{prefix}background_accuracy"] = [colour for _, colour in right]
            objects = len({scene.thing for scene in asked})
            columns = min(objects, _COLUMNS)
            rows = [found[i : i + columns] for i in range(0, len(found), objects)][:_ROWS]
            log.info("%simages.png: %d of %d images", prefix or "trained_", sum(map(len, rows)), len(found))
            labels = [scene.thing for scene in asked[:columns]]
            save_png(grid(rows, column_labels=labels), folder / f"{prefix or 'trained_'}images.png")
        strength_grid(source, artifact, requests, self.sampling, device, folder)
        return dict(shares(single, folder))


def reconstruction_psnr(vae: Any, renders: np.ndarray) -> list[float]:
    """dB of what ``vae`` makes of each of ``renders``."""
    return [float(value) for value in psnr(classifier.reconstruct(vae.cpu(), renders), renders)]
