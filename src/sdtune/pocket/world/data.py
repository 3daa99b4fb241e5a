"""Datasets of pocket's world: its training images, and a held-out subject."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated

import numpy as np
from annotated_types import Ge
from PIL import Image

from sdtune import streams
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.samples import Sample
from sdtune.errors import UserError
from sdtune.images.files import resize_and_crop
from sdtune.paths import pocket_art
from sdtune.pocket.world.arrays import caption
from sdtune.pocket.world.captions import article, full_caption
from sdtune.pocket.world.objects import BACKGROUNDS, BY_NAME, HELD_OUT, PLACES, SIZES
from sdtune.pocket.world.scenes import SIDE, Scene, compose_scene, draw_scene, mask, training_scene
from sdtune.randomness import generator


@cache
def _art_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(pocket_art().rglob("*.webp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class SceneSample:
    """Sample of a scene with a caption; the image is rendered on access."""

    def __init__(self, scene: Scene, caption: str) -> None:
        self.scene, self.caption = scene, caption
        self.size, self.repeats = (SIDE, SIDE), 1

    def __str__(self) -> str:
        return str(self.scene)

    def content(self) -> str:
        """Hash of the scene and of the art, which determine the image."""
        return hashlib.sha256(f"{self.scene}/{_art_hash()}".encode()).hexdigest()

    def image(self) -> Image.Image:
        return draw_scene(self.scene)

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        return resize_and_crop(self.image(), size, offset, flip)

    def mask(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """Loss mask, uint8 [H, W]: the object's mask."""
        return resize_and_crop(mask(self.scene).convert("RGB"), size, offset, flip)[..., 0]


def _prompt(noun: str, background: str, size: str | None) -> str:
    return f"a photo of {article(f'{size} {noun}' if size else noun)} on {article(background)} background"


@dataclass(kw_only=True, eq=False)
class World(ImageDataModule):
    """Training images of pocket.

    Args:
        images: number of training images.
        world_seed: seed of the scenes and captions.
        validation_images: number of additional images for the validation loss.
    """

    images: Annotated[int, Ge(1)] = 40_000
    world_seed: int = 0
    validation_images: Annotated[int, Ge(0)] = 0

    name: str = field(default="world", init=False)

    def read(self) -> tuple[Sequence[Sample], Sequence[Sample]]:
        count = self.images + self.validation_images
        samples = [SceneSample(training_scene(self.world_seed, i), caption(self.world_seed, i)) for i in range(count)]
        return samples[: self.images], samples[self.images :]


@dataclass(kw_only=True, eq=False)
class Subject(ImageDataModule):
    """A few images of a held-out object of a known class, each on a different background.

    Args:
        subject: name of the held-out object.
        images: number of training images, each on a different background.
        token: trigger word of the subject.
        with_class: whether prompts name the class after the trigger word ("sks bird"); false for a learned new token.
        validation_images: number of additional images for the validation loss, on other backgrounds.
    """

    subject: str = "parrot"
    images: Annotated[int, Ge(1)] = 5
    token: str = "sks"
    with_class: bool = True
    validation_images: Annotated[int, Ge(0)] = 0

    name: str = field(default="subject", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        held_out = [thing.name for thing in HELD_OUT]
        if self.subject not in held_out:
            raise UserError(
                f"unknown held-out subject {self.subject!r}",
                key="data.subject",
                remedy=f"use one of {', '.join(held_out)}",
            )
        if self.images > len(BACKGROUNDS) - 2:
            raise UserError(
                f"{self.images} images leave too few unseen backgrounds", key="data.images", remedy="set at most 10"
            )
        self.name = self.subject.replace(" ", "_")

    @property
    def noun(self) -> str:
        """Noun phrase for the subject in prompts, such as "sks bird"."""
        return f"{self.token} {BY_NAME[self.subject].word}" if self.with_class else self.token

    @property
    def class_word(self) -> str:
        """Class word of the subject, such as "bird"."""
        return BY_NAME[self.subject].word

    def backgrounds(self) -> list[str]:
        """Backgrounds of the training images, in order; the images show no other background."""
        order = generator(0, f"{streams.SUBJECT}/{self.subject}").permutation(len(BACKGROUNDS))
        return [list(BACKGROUNDS)[int(i)] for i in order[: self.images]]

    def prompt(self, background: str, size: str | None = None) -> str:
        """Prompt for the subject on a background."""
        return _prompt(self.noun, background, size)

    def class_text(self, background: str, size: str | None = None) -> str:
        """Prompt for the class on a background."""
        return _prompt(self.class_word, background, size)

    def scenes(self) -> list[Scene]:
        """Scenes of the training images; sizes and places alternate."""
        return self._scenes(self.backgrounds(), streams.SUBJECT_SCENE)

    def _scenes(self, backgrounds: Sequence[str], stream: str) -> list[Scene]:
        rng = generator(0, f"{streams.SUBJECT}/{self.subject}/{stream}")
        sizes, places = list(SIZES), list(PLACES)
        return [
            compose_scene(self.subject, background, sizes[i % 2], places[i % len(places)], rng)
            for i, background in enumerate(backgrounds)
        ]

    def read(self) -> tuple[Sequence[Sample], Sequence[Sample]]:
        absent = [background for background in BACKGROUNDS if background not in self.backgrounds()]
        held_out = self._scenes(
            [absent[i % len(absent)] for i in range(self.validation_images)], streams.SUBJECT_VALIDATION
        )
        train, validation = (
            [SceneSample(s, f"a photo of {full_caption(s, self.noun)}") for s in scenes]
            for scenes in (self.scenes(), held_out)
        )
        return train, validation
