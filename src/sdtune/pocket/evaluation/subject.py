"""The evaluation that the image world allows: what an image shows is read, not guessed.

These metrics are of pocket's world and cannot be compared with published ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge

from sdtune import streams
from sdtune.backbone import Facts, Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.evaluation.clip import Clip, check_clip, clip_image, clip_text
from sdtune.evaluation.distances import distances, nearest, prior_drift
from sdtune.evaluation.draw import draw_base, draw_images, references, trained
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

log = logging.getLogger("sdtune")


def shares(readings: Mapping[str, Sequence[float]], folder: Path) -> dict[str, float]:
    """The mean of each metric; the readings of the single images are kept in ``folder``, for intervals."""
    write_json(folder / READINGS, readings)
    return {key: sum(values) / len(values) for key, values in readings.items()}


class SubjectMetrics:
    """Is the subject there, on the background that was asked for, and is its class still the class?

    All are shares from 0 to 1 where nothing else is said. ``subject_accuracy``: share of images that the measuring
    classifier reads as the subject; ``background_accuracy``: share whose border has the colour of the prompt. Both on
    backgrounds absent from the training images, big objects, for the base too (``base_``).
    ``ceiling_subject_accuracy`` is the classifier's on true renders of the subject that went through the VAE;
    ``subject_gain`` = (value - base) / (ceiling - base): 0 is the base, 1 the ceiling; it can be negative, and a
    little above 1.

    Prompted with the class word alone, on every background: ``prior_leak``, the share of images read as the
    subject; ``class_diversity``, the mean distance between the images by CLIP, as a ratio to the base's (0 where
    all are one, 1 as the base); ``prior_drift``, how far they are from the base's
    (:func:`sdtune.evaluation.distances.prior_drift`). ``diversity`` and ``memorisation`` are those of
    :class:`sdtune.evaluation.ClipMetrics`, on the subject's images; images that are not of pocket's world are
    measured by that one instead.

    Args:
        images: how many are drawn of the subject.
        class_images: how many of the class; 0 leaves its metrics out.
        seed: of the first image; the others follow.
        clip: as in :class:`sdtune.evaluation.ClipMetrics`.
        sampling: how.
    """

    def __init__(
        self,
        images: Annotated[int, Ge(1)] = 210,
        class_images: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Ge(0)] = 1000,
        clip: str | None = "pocket",
        sampling: Sampling | None = None,
    ) -> None:
        self.count, self.class_count, self.seed, self.clip = images, class_images, seed, clip
        self.sampling = sampling or Sampling()
        if class_images and clip is None:
            raise UserError(
                "class_diversity needs a CLIP", key="evaluation.class_images", remedy="give evaluation.clip=pocket too"
            )

    names: tuple[str, ...] = (
        *("subject_gain", "subject_accuracy", "background_accuracy", "ceiling_subject_accuracy", "prior_leak"),
        *("prior_drift", "class_diversity", "class_distance", "diversity", "memorisation", "clip_image", "clip_text"),
    )
    """Of its metrics."""

    def check(self, data: ImageDataModule, facts: Facts) -> None:
        """UserError before any weights are loaded."""
        if not isinstance(data, Subject):
            self._of_any_images().check(data, facts)
            self.names = ClipMetrics.names
            return
        if facts.side != SIDE:
            raise UserError(
                f"pocket_subject reads {SIDE}x{SIDE} images, the backbone makes {facts.side}", key="evaluation"
            )
        self.sampling.check(facts.factor)
        if self.clip is not None:
            check_clip(self.clip)

    def _of_any_images(self) -> ClipMetrics:
        # As many as the world's small images are drawn at once would be too many of Stable Diffusion's.
        sampling = replace(self.sampling, batch_size=min(self.sampling.batch_size, 8))
        count = max(2, min(self.count, 32))
        return ClipMetrics(images=count, seed=self.seed, clip=self.clip, sampling=sampling)

    def run(
        self, source: Pretrained, data: ImageDataModule, artifact: Path, name: str, device: torch.device, folder: Path
    ) -> dict[str, Any]:
        """The metrics; grids of what was measured go to ``folder``."""
        if not isinstance(data, Subject):
            log.info("evaluation: these images are not of pocket's world; they are measured as by evaluation=clip")
            return self._of_any_images().run(source, data, artifact, name, device, folder)
        unseen = [b for b in BACKGROUNDS if b not in data.backgrounds()]
        wanted = [unseen[i % len(unseen)] for i in range(self.count)]
        requests = [Request(data.prompt(b, "big"), self.seed + i) for i, b in enumerate(wanted)]
        others = self._of_class(data)
        reader = classifier.load_classifier()
        drawn = {"base_": draw_base(source, [*requests, *others], self.sampling, device)}
        with trained(source, artifact, name, device) as backbone:
            drawn[""] = draw_images(backbone, [*requests, *others], self.sampling)
            ceiling = self.ceiling(backbone, reader, data.subject, unseen)
        clip = Clip(self.clip, device) if self.clip else None  # runs that share a backbone all wait for the drawing
        metrics: dict[str, Any] = {"ceiling_subject_accuracy": ceiling}
        readings: dict[str, list[float]] = {}
        for prefix, both in drawn.items():
            images, classes = both[: self.count], both[self.count :]
            subject = self._read_subject(images, wanted, reader, data)
            if clip is not None:
                metrics |= {
                    f"{prefix}clip_image": clip_image(clip, images, references(data)),
                    f"{prefix}clip_text": clip_text(clip, images, [r.prompt for r in requests]),
                }
                embedded = clip.images(images)
                subject["diversity"] = distances(embedded)
                subject["memorisation"] = nearest(embedded, clip.images(references(data)))
            _save_rows(images, unseen, 8, folder / f"{prefix or 'trained_'}images.png")
            if classes and clip is not None:
                subject["prior_leak"] = (np.array(reader.read(np.stack(classes)).object) == data.subject).tolist()
                subject["class_distance"] = distances(clip.images(classes))
                _save_rows(classes, list(BACKGROUNDS), 6, folder / f"{prefix or 'trained_'}class.png")
            readings |= {f"{prefix}{key}": values for key, values in subject.items()}
        strength_grid(source, artifact, requests, self.sampling, device, folder)
        metrics |= shares(readings, folder)
        if others and clip is not None:
            metrics["prior_drift"] = prior_drift(*(clip.images(drawn[key][self.count :]) for key in ("", "base_")))
            metrics["class_diversity"] = metrics["class_distance"] / metrics["base_class_distance"]
        return _with_gain(metrics, ceiling, bool(others))

    def _of_class(self, data: Subject) -> list[Request]:
        """Images of the class alone, on every background by turns."""
        colours = list(BACKGROUNDS)
        plain = [data.class_text(colours[i % len(colours)], "big") for i in range(self.class_count)]
        return [Request(text, self.seed + self.count + i) for i, text in enumerate(plain)]

    @staticmethod
    def _read_subject(
        images: Sequence[np.ndarray], backgrounds: Sequence[str], reader: Any, data: Subject
    ) -> dict[str, list[float]]:
        """Whether each image shows the subject, and the background that was asked for."""
        stack = np.stack(images)
        read = np.array(reader.read(stack).object)
        right = np.array(classifier.background(stack)) == np.array(backgrounds)
        return {"subject_accuracy": (read == data.subject).tolist(), "background_accuracy": right.tolist()}

    def ceiling(self, backbone: Backbone, reader: Any, subject: str, backgrounds: list[str]) -> float:
        """The share of true drawings of ``subject`` that ``reader`` knows after a pass through the VAE."""
        rng = generator(self.seed, streams.EVALUATION_CEILING)
        places = list(PLACES)
        scenes = [
            compose_scene(subject, backgrounds[i % len(backgrounds)], "big", places[i % len(places)], rng)
            for i in range(self.count)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(draw_scene(s)) for s in scenes])).permute(0, 3, 1, 2)
        correct = 0
        with torch.no_grad():
            for part in torch.split(pixels, 32):
                moments = backbone.encode_images(part.to(backbone.device).float() / 127.5 - 1)
                means = moments.chunk(2, dim=1)[0]
                shown = backbone.decode(backbone.latents(moments, torch.zeros_like(means)))
                stack = (shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                correct += sum(name == subject for name in reader.read(stack).object)
        return correct / self.count


def _save_rows(images: Sequence[np.ndarray], columns: Sequence[str], most: int, path: Path) -> None:
    """A grid of ``images``, a column for each of ``columns``, at most ``most`` rows."""
    width = len(columns)
    rows = [images[i : i + width] for i in range(0, min(len(images), most * width), width)]
    save_png(grid(rows, column_labels=columns), path)


def _with_gain(metrics: dict[str, Any], ceiling: float, has_class: bool) -> dict[str, Any]:
    """``metrics`` with the share of the possible gain that was made, and reasons for those that are null."""
    room = ceiling - metrics["base_subject_accuracy"]
    gain = metrics["subject_accuracy"] - metrics["base_subject_accuracy"]
    metrics = {**metrics, "subject_gain": gain / room if room > 0 else None}
    reasons = {} if room > 0 else {"subject_gain": "the base is at the ceiling already"}
    if not has_class:
        why = "no images of the class alone are drawn: evaluation.class_images=210"
        reasons |= dict.fromkeys(("prior_leak", "prior_drift", "class_diversity"), why)
    return {**dict.fromkeys(reasons), **metrics, **({"reasons": reasons} if reasons else {})}
