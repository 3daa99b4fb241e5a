"""Evaluation for any backbone: fixed prompts and seeds, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from sdtune.backbone import Facts, Pretrained
from sdtune.data import ImageDataModule
from sdtune.data.control.base import FromImage
from sdtune.data.previews import preview_prompts
from sdtune.evaluation import clip as clip_model
from sdtune.evaluation import dino as dino_model
from sdtune.evaluation.agreement import agreement
from sdtune.evaluation.clip import Clip, clip_image, clip_text
from sdtune.evaluation.dino import Dino, dino_image
from sdtune.evaluation.distances import distances, nearest, prior_drift
from sdtune.evaluation.draw import draw_base, draw_images, references, trained
from sdtune.evaluation.strengths import strength_grid
from sdtune.images.grids import grid, save_png
from sdtune.sampling.loop import Request, Sampling


class ClipMetrics:
    """Metrics of the trained model and (``base_``) of the base, on fixed prompts and seeds, by a CLIP that is named.

    ``clip_image``, ``clip_text``: likeness to the training images and to the prompts. ``diversity``: mean distance
    between the images (:func:`sdtune.evaluation.distances.distances`). ``memorisation``: mean likeness to the nearest
    training image (:func:`sdtune.evaluation.distances.nearest`). ``prior_drift``, where the data has a class
    prompt: distance between the class's images and the base's (:func:`sdtune.evaluation.distances.prior_drift`).
    ``dino_image``: as ``clip_image``, by a DINO. ``control_agreement``, for a ControlNet: mean agreement of the asked
    map with that of the image (:func:`sdtune.evaluation.agreement.agreement`); the base sees the prompt alone, and
    shows what agrees by chance.

    Args:
        prompts: what is drawn; the data's own captions (at most eight) if None.
        images: how many images in all, shared out over the prompts; as many of the class.
        seed: of the first image; the others follow.
        clip: the folder of a CLIP; without one its metrics are null, and nothing is downloaded.
        dino: the folder of a DINO or DINOv2, likewise.
        sampling: how.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        images: Annotated[int, Ge(2)] = 32,
        seed: Annotated[int, Ge(0)] = 1000,
        clip: str | None = None,
        dino: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.prompts, self.count, self.seed, self.clip, self.dino = prompts, images, seed, clip, dino
        self.sampling = sampling or Sampling()

    names = ("clip_image", "clip_text", "diversity", "memorisation", "dino_image", "control_agreement", "prior_drift")
    """Of its metrics."""

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """UserError before any weights are loaded."""
        self.sampling.check(facts.factor)
        if self.clip is not None:
            clip_model.check_clip(self.clip)
        if self.dino is not None:
            dino_model.check_dino(self.dino)

    def run(
        self, source: Pretrained, data: ImageDataModule, artifact: Path, name: str, device: torch.device, folder: Path
    ) -> dict[str, Any]:
        """The metrics; grids of what was measured go to ``folder``."""
        asked = preview_prompts(data, self.prompts, 8, self.sampling.size(source.facts.side))
        shown_for = [asked[i % len(asked)] for i in range(self.count)]
        requests = [Request(one.prompt, self.seed + i, one.maps) for i, one in enumerate(shown_for)]
        metrics: dict[str, Any] = {}
        if self.clip is not None or self.dino is not None or isinstance(data.control, FromImage):
            metrics = self._measured(source, data, artifact, name, device, folder, requests)
        strength_grid(source, artifact, requests, self.sampling, device, folder)
        return {**metrics, **_null(metrics, self._reasons(data))}

    def _reasons(self, data: ImageDataModule) -> dict[str, str]:
        """Why metrics that are missing are."""
        ours = ("clip_image", "clip_text", "diversity", "memorisation")
        without = "no {}: evaluation.{}=FOLDER measures with one; nothing is downloaded unasked"
        reasons = {f"{prefix}{key}": without.format("CLIP named", "clip") for prefix in ("", "base_") for key in ours}
        for prefix in ("", "base_"):
            reasons[f"{prefix}dino_image"] = without.format("DINO named", "dino")
        drift = "the data has no data.class_prompt" if self.clip else without.format("CLIP named", "clip")
        none = "the data has no control maps" if data.control is None else "its maps are not made from images"
        return {**reasons, "prior_drift": drift, "control_agreement": none, "base_control_agreement": none}

    def _measured(
        self,
        source: Pretrained,
        data: ImageDataModule,
        artifact: Path,
        name: str,
        device: torch.device,
        folder: Path,
        requests: Sequence[Request],
    ) -> dict[str, Any]:
        others = self._class(data) if self.clip is not None else []
        shown = references(data)
        metrics: dict[str, Any] = {}
        classes: list[Tensor] = []
        # The base reads no map, and draws the same for all runs of a sweep.
        drawn = {"base_": draw_base(source, [replace(r, maps=()) for r in (*requests, *others)], self.sampling, device)}
        with trained(source, artifact, name, device) as backbone:
            drawn[""] = draw_images(backbone, [*requests, *others], self.sampling)
        # Loaded when the images are there: where runs share a backbone, all of them wait for the drawing.
        clip = Clip(self.clip, device) if self.clip is not None else None
        dino = Dino(self.dino, device) if self.dino is not None else None
        for prefix, whole in drawn.items():
            images, of_class = whole[: self.count], whole[self.count :]
            if clip is not None:
                embedded, training = clip.images(images), clip.images(shown)
                metrics[f"{prefix}clip_image"] = clip_image(clip, images, shown)
                metrics[f"{prefix}clip_text"] = clip_text(clip, images, [r.prompt for r in requests])
                metrics[f"{prefix}diversity"] = fmean(distances(embedded))
                metrics[f"{prefix}memorisation"] = fmean(nearest(embedded, training))
                classes += [clip.images(of_class)] if of_class else []
            if dino is not None:
                metrics[f"{prefix}dino_image"] = dino_image(dino, images, shown)
            if isinstance(data.control, FromImage):
                pairs = zip(requests, data.control.again(images, device), strict=True)
                agreed = [agreement(data.control.task, request.maps[0], found) for request, found in pairs]
                metrics[f"{prefix}control_agreement"] = fmean(agreed)
            for kind, found in (("images", images), ("class", of_class)):
                if found:
                    sheet = grid([found[i : i + 8] for i in range(0, min(64, len(found)), 8)])
                    save_png(sheet, folder / f"{prefix or 'trained_'}{kind}.png")
        if classes:
            metrics["prior_drift"] = prior_drift(classes[1], classes[0])
        return metrics

    def _class(self, data: ImageDataModule) -> list[Request]:
        """As many images of the class, where the data names it."""
        prompts = data.class_prompts
        if not prompts:
            return []
        return [Request(prompts[i % len(prompts)], self.seed + self.count + i) for i in range(self.count)]


def _null(metrics: Mapping[str, Any], reasons: Mapping[str, str]) -> dict[str, Any]:
    """What was not measured, with its reasons."""
    missing = {key: reason for key, reason in reasons.items() if key not in metrics}
    return {**dict.fromkeys(missing), **({"reasons": missing} if missing else {})}
