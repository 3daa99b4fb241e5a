"""Evaluation of a subject trained on pocket's world: subject accuracy, background accuracy, class preservation.

The metrics are specific to pocket's world and not comparable with published ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Interval

from sdtune import streams
from sdtune.backbone import Facts
from sdtune.backbone.backbone import Backbone
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.evaluation.clip import Clip, check_clip, clip_image, clip_text
from sdtune.evaluation.distances import distances, nearest, prior_drift
from sdtune.evaluation.references import references
from sdtune.evaluation.strengths import strength_grid
from sdtune.evaluation.subject_metrics import ClipMetrics
from sdtune.files import write_json
from sdtune.images.grids import grid, save_png
from sdtune.pocket.evaluation import classifier
from sdtune.pocket.world.data import Subject
from sdtune.pocket.world.objects import BACKGROUNDS, PLACES
from sdtune.pocket.world.scenes import SIDE, compose_scene, draw_scene
from sdtune.randomness import generator
from sdtune.runs.layout import READINGS
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import RunModels, generate_images

log = logging.getLogger("sdtune")


def shares(readings: Mapping[str, Sequence[float]], folder: Path) -> dict[str, float]:
    """Mean of each metric; writes the per-image values to ``folder``, for confidence intervals."""
    write_json(folder / READINGS, readings)
    return {key: sum(values) / len(values) for key, values in readings.items()}


class SubjectMetrics:
    """Subject accuracy, background accuracy and preservation of the subject's class.

    All metrics are fractions in [0, 1] unless stated otherwise. ``subject_accuracy``: images that the classifier reads
    as the subject. ``background_accuracy``: images whose border has the background color of the prompt. Both use big
    objects on backgrounds absent from the training images. ``base_...``: the same for the base model.
    ``ceiling_subject_accuracy``: accuracy of the classifier on VAE reconstructions of true renders of the subject.
    ``subject_gain`` = (value - base) / (ceiling - base): 0 is the base, 1 the ceiling; it can be negative or slightly
    above 1.

    With prompts that name only the class, on every background: ``prior_leak``, images read as the subject;
    ``class_diversity``, mean CLIP distance between the images divided by that of the base (0: all images identical,
    1: as diverse as the base); ``prior_drift``, distance from the images of the base
    (:func:`sdtune.evaluation.distances.prior_drift`). ``diversity`` and ``memorisation`` are those of
    :class:`sdtune.evaluation.ClipMetrics`, on the subject's images. Data other than a subject of pocket's world is
    evaluated by that class instead.

    Args:
        images: number of subject images.
        class_images: number of class images; 0 omits the class metrics.
        seed: seed of the first image; each next image adds 1.
        clip: as in :class:`sdtune.evaluation.ClipMetrics`.
        sampling: sampling settings.
    """

    def __init__(
        self,
        images: Annotated[int, Ge(1)] = 210,
        class_images: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Interval(ge=0, lt=2**63)] = 1000,
        clip: str | None = "pocket",
        sampling: Sampling | None = None,
    ) -> None:
        self.count, self.class_count, self.seed, self.clip = images, class_images, seed, clip
        self.sampling = sampling or Sampling()
        if class_images and clip is None:
            raise UserError(
                "class_diversity needs a CLIP model",
                key="evaluation.class_images",
                remedy="set evaluation.clip=pocket",
            )

    names: tuple[str, ...] = (
        *("subject_gain", "subject_accuracy", "background_accuracy", "ceiling_subject_accuracy", "prior_leak"),
        *("prior_drift", "class_diversity", "class_distance", "diversity", "memorisation", "clip_image", "clip_text"),
    )
    """Names of the metrics."""

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """Raise UserError if the settings cannot be evaluated, before any weights are loaded."""
        if not isinstance(data, Subject):
            self._clip_metrics().check(data, facts)
            self.names = ClipMetrics.names
            return
        if facts.side != SIDE:
            raise UserError(
                f"pocket_subject needs {SIDE}x{SIDE} images, the backbone generates {facts.side}x{facts.side}",
                key="evaluation",
                remedy="use backbone=pocket or evaluation=clip",
            )
        self.sampling.check(facts, "evaluation.sampling")
        if self.clip is not None:
            check_clip(self.clip)

    def _clip_metrics(self) -> ClipMetrics:
        # The defaults suit 64x64 images; use fewer images and a smaller batch for Stable Diffusion.
        sampling = replace(self.sampling, batch_size=min(self.sampling.batch_size, 8))
        count = max(2, min(self.count, 32))
        return ClipMetrics(images=count, seed=self.seed, clip=self.clip, sampling=sampling)

    def run(self, models: RunModels, data: ImageDataModule, folder: Path) -> dict[str, Any]:
        """Compute the metrics; writes grids of the measured images to ``folder``."""
        if not isinstance(data, Subject):
            log.info("evaluation: the data is not a subject of pocket's world; using the metrics of evaluation=clip")
            return self._clip_metrics().run(models, data, folder)
        unseen = [b for b in BACKGROUNDS if b not in data.backgrounds()]
        backgrounds = [unseen[i % len(unseen)] for i in range(self.count)]
        requests = [Request(data.prompt(b, "big"), self.seed + i) for i, b in enumerate(backgrounds)]
        class_requests = self._class_requests(data)
        reader = classifier.load_classifier()
        generated = {"base_": models.base_images([*requests, *class_requests], self.sampling)}
        with models.trained() as backbone:
            generated[""] = generate_images(backbone, [*requests, *class_requests], self.sampling)
            ceiling = self.ceiling(backbone, reader, data.subject, unseen)
        strength_grid(models, requests, self.sampling, folder)
        # Load CLIP after sampling: runs that share a backbone wait for each other's sampling.
        models.release()
        clip = Clip(self.clip, models.device) if self.clip else None
        metrics: dict[str, Any] = {"ceiling_subject_accuracy": ceiling}
        readings: dict[str, list[float]] = {}
        for prefix, all_images in generated.items():
            images, class_images = all_images[: self.count], all_images[self.count :]
            subject = self._read_subject(images, backgrounds, reader, data)
            if clip is not None:
                metrics |= {
                    f"{prefix}clip_image": clip_image(clip, images, references(data)),
                    f"{prefix}clip_text": clip_text(clip, images, [r.prompt for r in requests]),
                }
                embedded = clip.images(images)
                subject["diversity"] = distances(embedded)
                subject["memorisation"] = nearest(embedded, clip.images(references(data)))
            _save_rows(images, unseen, 8, folder / f"{prefix or 'trained_'}images.png")
            if class_images and clip is not None:
                subject["prior_leak"] = (np.array(reader.read(np.stack(class_images)).object) == data.subject).tolist()
                subject["class_distance"] = distances(clip.images(class_images))
                _save_rows(class_images, list(BACKGROUNDS), 6, folder / f"{prefix or 'trained_'}class.png")
            readings |= {f"{prefix}{key}": values for key, values in subject.items()}
        metrics |= shares(readings, folder)
        if class_requests and clip is not None:
            metrics["prior_drift"] = prior_drift(*(clip.images(generated[key][self.count :]) for key in ("", "base_")))
            metrics["class_diversity"] = metrics["class_distance"] / metrics["base_class_distance"]
        return _with_gain(metrics, ceiling, bool(class_requests))

    def _class_requests(self, data: Subject) -> list[Request]:
        """Requests for images of the class, on all backgrounds in turn."""
        colours = list(BACKGROUNDS)
        prompts = [data.class_text(colours[i % len(colours)], "big") for i in range(self.class_count)]
        return [Request(text, self.seed + self.count + i) for i, text in enumerate(prompts)]

    @staticmethod
    def _read_subject(
        images: Sequence[np.ndarray], backgrounds: Sequence[str], reader: Any, data: Subject
    ) -> dict[str, list[float]]:
        """Whether each image shows the subject, and whether it shows the requested background."""
        stack = np.stack(images)
        objects = np.array(reader.read(stack).object)
        correct = np.array(classifier.background(stack)) == np.array(backgrounds)
        return {"subject_accuracy": (objects == data.subject).tolist(), "background_accuracy": correct.tolist()}

    def ceiling(self, backbone: Backbone, reader: Any, subject: str, backgrounds: list[str]) -> float:
        """Fraction of true renders of ``subject`` that ``reader`` recognizes after VAE encoding and decoding."""
        rng = generator(self.seed, streams.EVALUATION_CEILING)
        places = list(PLACES)
        scenes = [
            compose_scene(subject, backgrounds[i % len(backgrounds)], "big", places[i % len(places)], rng)
            for i in range(self.count)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(draw_scene(s)) for s in scenes])).permute(0, 3, 1, 2)
        correct = 0
        with torch.no_grad():
            for batch in torch.split(pixels, 32):
                moments = backbone.encode_images(batch.to(backbone.device).float() / 127.5 - 1)
                means = moments.chunk(2, dim=1)[0]
                decoded = backbone.decode(backbone.latents(moments, torch.zeros_like(means)))
                stack = (decoded * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                correct += sum(name == subject for name in reader.read(stack).object)
        return correct / self.count


def _save_rows(images: Sequence[np.ndarray], columns: Sequence[str], max_rows: int, path: Path) -> None:
    """Save a grid of ``images`` with labeled ``columns`` and at most ``max_rows`` rows."""
    width = len(columns)
    rows = [images[i : i + width] for i in range(0, min(len(images), max_rows * width), width)]
    save_png(grid(rows, column_labels=columns), path)


def _with_gain(metrics: dict[str, Any], ceiling: float, has_class: bool) -> dict[str, Any]:
    """``metrics`` with ``subject_gain``, and with reasons for null values."""
    room = ceiling - metrics["base_subject_accuracy"]
    gain = metrics["subject_accuracy"] - metrics["base_subject_accuracy"]
    metrics = {**metrics, "subject_gain": gain / room if room > 0 else None}
    reasons = {} if room > 0 else {"subject_gain": "the base is already at the ceiling"}
    if not has_class:
        reason = "no class images are generated; set evaluation.class_images=210"
        reasons |= dict.fromkeys(("prior_leak", "prior_drift", "class_diversity"), reason)
    return {**dict.fromkeys(reasons), **metrics, **({"reasons": reasons} if reasons else {})}
