"""Images and control maps at the size in which they are encoded for the caches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sdtune.data.control.base import Control, map_to_tensor
from sdtune.data.samples import Sample, to_tensor
from sdtune.errors import UserError
from sdtune.images.files import CENTER


@dataclass(frozen=True)
class View:
    """Input of the latent cache: a sample, scaled and center-cropped to ``size`` (width, height), mirrored or not.

    ``control``: the source of its control map, if the map is encoded instead of the image.
    """

    sample: Sample
    size: tuple[int, int]
    flip: bool
    control: Control | None = None

    def tensor(self) -> Tensor:
        """Image, float32 [3, H, W] in [-1, 1]; or control map, in [0, 1]."""
        if self.control is not None:
            return map_to_tensor(self.control.map(self.sample, self.size, CENTER, self.flip))
        return to_tensor(self.sample.pixels(self.size, CENTER, self.flip))

    def is_readable(self) -> bool:
        """Whether the image can be read."""
        try:
            self.tensor()
        except UserError:
            return False
        return True

    def __str__(self) -> str:
        return str(self.sample)


def map_key(control: Control, sample: Sample, size: tuple[int, int], flip: bool) -> str:
    """Cache key of the encoded control map of ``sample`` at ``size`` (width, height)."""
    return f"map|{control.content(sample, size, flip)}|{size[0]}x{size[1]}|{'flip' if flip else 'plain'}"
