"""Metrics for any backbone, on fixed prompts and seeds, of the base and the trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge, Interval
from torch import Tensor

from sdtune.backbone import Facts
from sdtune.data import ImageDataModule
from sdtune.data.control.base import FromImage
from sdtune.data.previews import preview_prompts
from sdtune.evaluation import clip as clip_model
from sdtune.evaluation import dino as dino_model
from sdtune.evaluation.agreement import agreement
from sdtune.evaluation.clip import Clip, clip_image, clip_text
from sdtune.evaluation.dino import Dino, dino_image
from sdtune.evaluation.distances import distances, nearest, prior_drift
from sdtune.evaluation.references import references
from sdtune.evaluation.strengths import strength_grid
from sdtune.images.grids import grid, save_png
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import RunModels


class ClipMetrics:
    """CLIP, DINO and control metrics of the trained model and of the base (``base_...``), on fixed prompts and seeds.

    ``clip_image``, ``clip_text``: CLIP similarity to the training images and to the prompts. ``diversity``: mean
    distance between the images (:func:`sdtune.evaluation.distances.distances`). ``memorisation``: mean similarity to
    the nearest training image (:func:`sdtune.evaluation.distances.nearest`). ``prior_drift``, if the data has a class
    prompt: distance between the class images of the trained model and of the base
    (:func:`sdtune.evaluation.distances.prior_drift`). ``dino_image``: like ``clip_image``, with DINO.
    ``control_agreement``, for a ControlNet: mean agreement of the requested map with the map extracted from the image
    (:func:`sdtune.evaluation.agreement.agreement`); the base receives only the prompt and shows the agreement by
    chance.

    Args:
        prompts: prompts of the images; None: captions of the data, at most eight.
        images: number of images, distributed over the prompts; also the number of class images.
        seed: seed of the first image; each next image adds 1.
        clip: folder of a CLIP model, or pocket; null: its metrics are null. Nothing is downloaded.
        dino: folder of a DINO or DINOv2 model; null: its metrics are null. Nothing is downloaded.
        sampling: sampling settings.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        images: Annotated[int, Ge(2)] = 32,
        seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1000,
        clip: str | None = None,
        dino: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.prompts, self.count, self.seed, self.clip, self.dino = prompts, images, seed, clip, dino
        self.sampling = sampling or Sampling()

    names = ("clip_image", "clip_text", "diversity", "memorisation", "dino_image", "control_agreement", "prior_drift")
    """Names of the metrics."""

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """Raise UserError if the settings cannot be evaluated, before any weights are loaded."""
        self.sampling.check(facts, "evaluation.sampling")
        if self.clip is not None:
            clip_model.check_clip(self.clip)
        if self.dino is not None:
            dino_model.check_dino(self.dino)

    def run(self, models: RunModels, data: ImageDataModule, folder: Path) -> dict[str, Any]:
        """Compute the metrics; writes grids of the measured images to ``folder``."""
        previews = preview_prompts(data, self.prompts, 8, self.sampling.size(models.source.facts.side))
        cycled = [previews[i % len(previews)] for i in range(self.count)]
        requests = [Request(preview.prompt, self.seed + i, preview.conditions) for i, preview in enumerate(cycled)]
        metrics: dict[str, Any] = {}
        if self.clip is not None or self.dino is not None or isinstance(data.control, FromImage):
            metrics = self._measured(models, data, folder, requests)
        else:
            strength_grid(models, requests, self.sampling, folder)
        return {**metrics, **_null(metrics, self._reasons(data))}

    def _reasons(self, data: ImageDataModule) -> dict[str, str]:
        """Reason for each metric that may be missing."""
        clip_names = ("clip_image", "clip_text", "diversity", "memorisation")
        no_model = "no {} model; set evaluation.{}=FOLDER (nothing is downloaded)"
        reasons = {f"{prefix}{key}": no_model.format("CLIP", "clip") for prefix in ("", "base_") for key in clip_names}
        for prefix in ("", "base_"):
            reasons[f"{prefix}dino_image"] = no_model.format("DINO", "dino")
        drift = "data.class_prompt is not set" if self.clip else no_model.format("CLIP", "clip")
        no_map = "the data has no control maps" if data.control is None else "its maps are not extracted from images"
        return {**reasons, "prior_drift": drift, "control_agreement": no_map, "base_control_agreement": no_map}

    def _measured(
        self, models: RunModels, data: ImageDataModule, folder: Path, requests: Sequence[Request]
    ) -> dict[str, Any]:
        class_requests = self._class_requests(data) if self.clip is not None else []
        training_images = references(data)
        metrics: dict[str, Any] = {}
        class_embeddings: list[Tensor] = []
        # Without control maps, the base model's cached images serve all runs of a sweep.
        without_maps = [replace(request, conditions={}) for request in (*requests, *class_requests)]
        generated = {"base_": models.base_images(without_maps, self.sampling)}
        generated[""] = models.trained_images([*requests, *class_requests], self.sampling)
        strength_grid(models, requests, self.sampling, folder)
        # Load these models after sampling: runs that share a backbone wait for each other's sampling.
        models.release()
        clip = Clip(self.clip, models.device) if self.clip is not None else None
        dino = Dino(self.dino, models.device) if self.dino is not None else None
        for prefix, all_images in generated.items():
            images, class_images = all_images[: self.count], all_images[self.count :]
            if clip is not None:
                embedded, training = clip.images(images), clip.images(training_images)
                metrics[f"{prefix}clip_image"] = clip_image(clip, images, training_images)
                metrics[f"{prefix}clip_text"] = clip_text(clip, images, [r.prompt for r in requests])
                metrics[f"{prefix}diversity"] = fmean(distances(embedded))
                metrics[f"{prefix}memorisation"] = fmean(nearest(embedded, training))
                class_embeddings += [clip.images(class_images)] if class_images else []
            if dino is not None:
                metrics[f"{prefix}dino_image"] = dino_image(dino, images, training_images)
            if isinstance(data.control, FromImage):
                pairs = zip(requests, data.control.extract_maps(images, models.device), strict=True)
                agreements = [
                    agreement(data.control.task, request.conditions["control"], extracted)
                    for request, extracted in pairs
                ]
                metrics[f"{prefix}control_agreement"] = fmean(agreements)
            for kind, group in (("images", images), ("class", class_images)):
                if group:
                    sheet = grid([group[i : i + 8] for i in range(0, min(64, len(group)), 8)])
                    save_png(sheet, folder / f"{prefix or 'trained_'}{kind}.png")
        if class_embeddings:
            metrics["prior_drift"] = prior_drift(class_embeddings[1], class_embeddings[0])
        return metrics

    def _class_requests(self, data: ImageDataModule) -> list[Request]:
        """Requests for as many class images; empty if the data has no class prompt."""
        prompts = data.class_prompts
        if not prompts:
            return []
        return [Request(prompts[i % len(prompts)], self.seed + self.count + i) for i in range(self.count)]


def _null(metrics: Mapping[str, Any], reasons: Mapping[str, str]) -> dict[str, Any]:
    """Null values of the metrics that were not computed, with their reasons."""
    missing = {key: reason for key, reason in reasons.items() if key not in metrics}
    return {**dict.fromkeys(missing), **({"reasons": missing} if missing else {})}
