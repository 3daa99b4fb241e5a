"""Control maps from edges with OpenCV: canny, scribble."""

from __future__ import annotations

from typing import Annotated

import cv2
import numpy as np
from annotated_types import Ge, Interval

from sdtune.data.control.base import Computed
from sdtune.errors import UserError

Threshold = Annotated[float, Interval(ge=0, le=2000)]


class Canny(Computed):
    """Edges one pixel wide, white on black (Canny 1986).

    Args:
        low, high: thresholds of the gradient's L1 norm under a 3x3 Sobel filter; a line begins above ``high`` and goes
            on above ``low``. 100 and 200 are what published ControlNets were trained around.
    """

    name = "canny"

    def __init__(self, low: Threshold = 100.0, high: Threshold = 200.0) -> None:
        if low > high:
            raise UserError(
                f"{low:g} is above data.control.high ({high:g})",
                key="data.control.low",
                remedy="give the smaller first",
            )
        self.low, self.high = low, high

    def extract(self, pixels: np.ndarray) -> np.ndarray:
        return _grey(cv2.Canny(np.ascontiguousarray(pixels), self.low, self.high))


class Scribble(Computed):
    """Thick lines along the strong edges alone, white on black, as if drawn by hand.

    Args:
        blur: standard deviation in pixels of the Gaussian that takes small detail away first.
        low, high: as for :class:`Canny`, of the blurred image.
        width: of the lines, in pixels.
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
                remedy="give the smaller first",
            )
        self.blur, self.low, self.high, self.width = blur, low, high, width

    def extract(self, pixels: np.ndarray) -> np.ndarray:
        edges = cv2.Canny(cv2.GaussianBlur(pixels, (0, 0), self.blur), self.low, self.high)
        pen = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (self.width, self.width))
        return _grey(cv2.dilate(edges, pen))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)
