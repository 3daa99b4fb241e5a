"""Control maps from edge detection with OpenCV: Canny edges, scribbles."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, ClassVar

import cv2
import numpy as np
from annotated_types import Ge, Interval
from PIL import Image

from sdtune.data.control.base import Computed
from sdtune.errors import UserError
from sdtune.files import mark_used
from sdtune.images.files import CENTER
from sdtune.images.grids import save_png
from sdtune.paths import cache_folder

if TYPE_CHECKING:
    from sdtune.data.samples import Sample

Threshold = Annotated[float, Interval(ge=0, le=2000)]


class EdgeMaps(Computed):
    """Edge maps, cached on disk by image content, size and settings: reading one is faster than decoding the image.

    Maps of random crops are computed each time, and so are those of other classes, whose code may change.
    """

    name: ClassVar[str]

    @property
    def _identity(self) -> str | None:
        """Kind and settings of the maps, for cache keys; None for a user's subclass, because its code may change."""
        if type(self) not in (Canny, Scribble):
            return None
        settings = "-".join(map(str, (*vars(self).values(), f"opencv{cv2.__version__}")))
        return f"{self.name}-{settings}"

    def content(self, sample: Sample, size: tuple[int, int], flip: bool) -> str:
        identity = self._identity
        return super().content(sample, size, flip) if identity is None else f"{identity}|{sample.content()}"

    def unmirrored_map(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        identity = self._identity
        if offset != CENTER or identity is None:
            return super().unmirrored_map(sample, size, offset)
        folder = cache_folder() / "control" / identity
        file = folder / f"{sample.content()}-{size[0]}x{size[1]}.png"
        with suppress(OSError, SyntaxError, ValueError):  # missing, or damaged in one of Pillow's ways
            with Image.open(file) as image:
                gray = np.asarray(image.convert("L"))
            mark_used(file)
            return _three_channels(gray)
        pixels = super().unmirrored_map(sample, size, offset)
        with suppress(OSError):  # a full disk, or on Windows another process that reads the file
            save_png(pixels[..., 0], file, sync=False)
        return pixels


class Canny(EdgeMaps):
    """Canny edges, one pixel wide, white on black (Canny 1986).

    Args:
        low, high: thresholds of the L1 norm of the 3x3 Sobel gradient: pixels above ``high`` are edges, and so are
            pixels above ``low`` that are connected to them. Published ControlNets were trained with values around 100
            and 200.
    """

    name = "canny"

    def __init__(self, low: Threshold = 100.0, high: Threshold = 200.0) -> None:
        if low > high:
            raise UserError(
                f"{low:g} is above data.control.high ({high:g})",
                key="data.control.low",
                remedy=f"set at most {high:g}",
            )
        self.low, self.high = low, high

    def extract(self, pixels: np.ndarray) -> np.ndarray:
        return _three_channels(cv2.Canny(np.ascontiguousarray(pixels), self.low, self.high))


class Scribble(EdgeMaps):
    """Thick lines along strong edges, white on black, similar to a hand-drawn scribble.

    Args:
        blur: standard deviation in pixels of the Gaussian blur that removes small details first.
        low, high: as for :class:`Canny`, for the blurred image.
        width: line width in pixels.
    """

    name = "scribble"

    def __init__(
        self,
        blur: Annotated[float, Interval(gt=0, le=50)] = 1.5,
        low: Threshold = 50.0,
        high: Threshold = 120.0,
        width: Annotated[int, Ge(1)] = 3,
    ) -> None:
        if low > high:
            raise UserError(
                f"{low:g} is above data.control.high ({high:g})",
                key="data.control.low",
                remedy=f"set at most {high:g}",
            )
        self.blur, self.low, self.high, self.width = blur, low, high, width

    def extract(self, pixels: np.ndarray) -> np.ndarray:
        edges = cv2.Canny(cv2.GaussianBlur(pixels, (0, 0), self.blur), self.low, self.high)
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (self.width, self.width))
        return _three_channels(cv2.dilate(edges, kernel))


def _three_channels(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)
