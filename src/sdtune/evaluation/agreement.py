"""Control agreement: the control map extracted from an image, compared with the one it was given."""

from __future__ import annotations

import cv2
import numpy as np

from sdtune.data.control.base import Task

MATCH = 0.0075
"""Share of the diagonal within which two pixels of lines count as the same (BSDS: Martin et al. 2004, section 3)."""


def agreement(task: Task, asked: np.ndarray, shown: np.ndarray) -> float:
    """From 0 to 1, of two maps uint8 [H, W, 3].

    Edges and poses: F1 of their pixels within :data:`MATCH`. Segmentation: IoU, mean over the classes that either map
    has. Depth: one less the root mean square of the difference, white being 1; maps of other images agree to about
    0.7 already. The same quantities as ControlNet++ reports (Li et al. 2024, section 4.1), which matches edges to the
    pixel and gives depth's error itself.
    """
    if task == "depth":
        return 1 - float(np.sqrt(np.mean(np.square((asked.astype(float) - shown) / 255))))
    if task == "segmentation":
        return mean_iou(_numbers(asked), _numbers(shown))
    height, width = asked.shape[:2]
    return line_f1(asked.max(-1) > 0, shown.max(-1) > 0, MATCH * float(np.hypot(height, width)))


def line_f1(one: np.ndarray, other: np.ndarray, near: float) -> float:
    """Harmonic mean of the shares of each one's pixels (bool [H, W]) within ``near`` pixels of the other's; 1 where
    both are empty."""
    if not one.any() or not other.any():
        return float(not one.any() and not other.any())
    shares = []
    for lines, others in ((one, other), (other, one)):
        distance = cv2.distanceTransform((~others).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        shares.append(float((distance[lines] <= near).mean()))
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two areas, bool [H, W]; 1 where both are empty."""
    union = float((one | other).sum())
    return float((one & other).sum()) / union if union else 1.0


def mean_iou(one: np.ndarray, other: np.ndarray) -> float:
    """:func:`iou`, mean over the values that either (int [H, W]) has."""
    values = np.union1d(one, other)
    return float(np.mean([iou(one == value, other == value) for value in values]))


def _numbers(colours: np.ndarray) -> np.ndarray:
    """A number for each colour, int [H, W]."""
    wide = colours.astype(np.int64)
    numbers: np.ndarray = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return numbers
