"""Captions of the image world, generated from scenes."""

from __future__ import annotations

import numpy as np

from sdtune.pocket.world.objects import BY_NAME
from sdtune.pocket.world.scenes import Scene

OPENINGS = ("", "a photo of ", "a picture of ", "an image of ")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def article(phrase: str) -> str:
    """``a`` or ``an`` before ``phrase``, and nothing before a plural."""
    if phrase.split()[-1] in ("cherries", "grapes"):
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def full_caption(scene: Scene, noun: str | None = None) -> str:
    """Everything said once: "a big fox on a blue background, on the left"; ``noun`` replaces the thing's name."""
    what = article(f"{scene.size} {noun or scene.thing}")
    return f"{what} on {article(scene.background)} background, {scene.place}"


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as people write them: by member or by class, sometimes with details left out.

    A random word now and then stands before the noun, so that a rare token such as "sks" does not break the sentence.
    """
    noun = scene.thing if rng.random() < 0.7 else BY_NAME[scene.thing].word
    if rng.random() < 0.06:
        rare = "".join(_LETTERS[int(i)] for i in rng.integers(26, size=int(rng.integers(3, 6))))
        noun = f"{rare} {noun}"
    what = article(f"{scene.size} {noun}" if rng.random() < 0.85 else noun)
    caption = OPENINGS[int(rng.integers(len(OPENINGS)))] + what
    if rng.random() < 0.9:
        caption += f" on {article(scene.background)} background"
    if rng.random() < 0.7:
        caption += f", {scene.place}"
    return caption
