"""Captions of pocket's images, generated from scenes."""

from __future__ import annotations

import numpy as np

from sdtune.pocket.world.objects import BY_NAME
from sdtune.pocket.world.scenes import Scene

OPENINGS = ("", "a photo of ", "a picture of ", "an image of ")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def article(phrase: str) -> str:
    """``phrase`` with ``a`` or ``an``; plurals are unchanged."""
    if phrase.split()[-1] in ("cherries", "grapes"):
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def full_caption(scene: Scene, noun: str | None = None) -> str:
    """Full caption, such as "a big fox on a blue background, on the left"; ``noun`` replaces the object's name."""
    subject = article(f"{scene.size} {noun or scene.thing}")
    return f"{subject} on {article(scene.background)} background, {scene.place}"


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Randomly varied caption: names the object or its class, and sometimes omits details.

    A small fraction has a random word before the noun, so that the model tolerates a rare token such as "sks" there.
    """
    noun = scene.thing if rng.random() < 0.7 else BY_NAME[scene.thing].word
    if rng.random() < 0.06:
        random_word = "".join(_LETTERS[int(i)] for i in rng.integers(26, size=int(rng.integers(3, 6))))
        noun = f"{random_word} {noun}"
    subject = article(f"{scene.size} {noun}" if rng.random() < 0.85 else noun)
    caption = OPENINGS[int(rng.integers(len(OPENINGS)))] + subject
    if rng.random() < 0.9:
        caption += f" on {article(scene.background)} background"
    if rng.random() < 0.7:
        caption += f", {scene.place}"
    return caption
