"""Dataset of a style that is new to pocket: Noto Color Emoji."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from sdtune import streams
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.samples import Sample
from sdtune.errors import UserError
from sdtune.pocket.world.captions import full_caption
from sdtune.pocket.world.data import SceneSample
from sdtune.pocket.world.objects import BACKGROUNDS, PLACES, SIZES, TRAINED, Thing
from sdtune.pocket.world.scenes import Scene, compose_scene
from sdtune.randomness import generator

STYLE = "noto"


def drawn() -> list[Thing]:
    """Objects with their own drawing in the style (without recolored ones), in a fixed random order."""
    things = [thing for thing in TRAINED if thing.recolour is None]
    return [things[int(i)] for i in generator(0, streams.STYLE_OBJECTS).permutation(len(things))]


@dataclass(kw_only=True, eq=False)
class Style(ImageDataModule):
    """Images of some objects in the style, with pocket's captions followed by the style's trigger word.

    Args:
        objects: number of objects; the others are used for the evaluation.
        images: number of images; they cycle through the objects, with random backgrounds, sizes and places.
        token: trigger word of the style, as in "in sks style".
    """

    objects: Annotated[int, Ge(1)] = 20
    images: Annotated[int, Ge(1)] = 200
    token: str = "sks"

    name: str = field(default="style", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(drawn()) - self.objects < 1:
            raise UserError(
                f"max {len(drawn()) - 1}, got {self.objects}; the evaluation needs at least one other object",
                key="data.objects",
            )

    def caption(self, scene: Scene) -> str:
        """Caption of ``scene`` with the style's trigger word."""
        return f"{full_caption(scene)}, in {self.token} style"

    def _scene(self, number: int) -> Scene:
        rng = generator(0, streams.STYLE_SCENE, number)
        background, size, place = (list(table)[int(rng.integers(len(table)))] for table in (BACKGROUNDS, SIZES, PLACES))
        return compose_scene(drawn()[number % self.objects].name, background, size, place, rng, STYLE)

    def read(self) -> tuple[Sequence[Sample], Sequence[Sample]]:
        scenes = [self._scene(number) for number in range(self.images)]
        return [SceneSample(scene, self.caption(scene)) for scene in scenes], []
