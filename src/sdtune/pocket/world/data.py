"""Data drawn from the image world: pocket's own training images, and a subject that it has never seen."""

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
    """A scene with a caption, drawn when it is looked at."""

    def __init__(self, scene: Scene, caption: str) -> None:
        self.scene, self.caption = scene, caption
        self.size, self.repeats = (SIDE, SIDE), 1

    def __str__(self) -> str:
        return str(self.scene)

    def content(self) -> str:
        """A drawing is a function of its scene and of the art, so those name its content."""
        return hashlib.sha256(f"{self.scene}/{_art_hash()}".encode()).hexdigest()

    def image(self) -> Image.Image:
        return draw_scene(self.scene)

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        return resize_and_crop(self.image(), size, offset, flip)

    def mask(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """The object alone counts."""
        return resize_and_crop(mask(self.scene).convert("RGB"), size, offset, flip)[..., 0]


def _prompt(noun: str, background: str, size: str | None) -> str:
    return f"a photo of {article(f'{size} {noun}' if size else noun)} on {article(background)} background"


@dataclass(kw_only=True, eq=False)
class World(ImageDataModule):
    """The world that pocket was trained on.

    Args:
        images: how many different ones.
        world_seed: which ones.
        validation_images: further ones for the validation loss.
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
    """A few images of one held-out member of a known class, each on a background of its own.

    Args:
        subject: the held-out thing.
        images: how many, on as many backgrounds.
        token: the rare word that is to mean the subject.
        with_class: whether prompts name the class after it ("sks bird"); a learned word stands alone.
        validation_images: further ones for the validation loss, on backgrounds that the others do not have.
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
                f"{self.subject!r} is not a held-out subject; there are {', '.join(held_out)}", key="data.subject"
            )
        if self.images > len(BACKGROUNDS) - 2:
            raise UserError(
                f"{self.images} leaves too few unseen backgrounds", key="data.images", remedy="give at most 10"
            )
        self.name = self.subject.replace(" ", "_")

    @property
    def noun(self) -> str:
        """What a prompt calls the subject: "sks bird"."""
        return f"{self.token} {BY_NAME[self.subject].word}" if self.with_class else self.token

    @property
    def class_word(self) -> str:
        """What the subject is a member of."""
        return BY_NAME[self.subject].word

    def backgrounds(self) -> list[str]:
        """The backgrounds of the images, in order; every other one is absent from them."""
        order = generator(0, f"{streams.SUBJECT}/{self.subject}").permutation(len(BACKGROUNDS))
        return [list(BACKGROUNDS)[int(i)] for i in order[: self.images]]

    def prompt(self, background: str, size: str | None = None) -> str:
        """A prompt for the subject on a background."""
        return _prompt(self.noun, background, size)

    def class_text(self, background: str, size: str | None = None) -> str:
        """A prompt for the class on a background."""
        return _prompt(self.class_word, background, size)

    def scenes(self) -> list[Scene]:
        """What the images show: both sizes, all places."""
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
