"""Control agreement: similarity of a requested control map and the map extracted from the generated image."""

from __future__ import annotations

import cv2
import numpy as np

from sdtune.data.control.base import Task

MATCH = 0.0075
"""Distance, as a fraction of the diagonal, up to which line pixels match (BSDS: Martin et al. 2004, section 3)."""


def agreement(task: Task, asked: np.ndarray, shown: np.ndarray) -> float:
    """Agreement in [0, 1] of two control maps, each uint8 [H, W, 3].

    Edges and poses: F1 score of their pixels, matched within :data:`MATCH`. Segmentation: mean IoU over the classes in
    either map. Depth: 1 minus the root mean square error, with white as 1; maps of unrelated images already score about
    0.7. ControlNet++ (Li et al. 2024, section 4.1) reports the same quantities, but matches edges exactly and reports
    the depth error itself.
    """
    if task == "depth":
        return 1 - float(np.sqrt(np.mean(np.square((asked.astype(float) - shown) / 255))))
    if task == "segmentation":
        return mean_iou(_color_labels(asked), _color_labels(shown))
    height, width = asked.shape[:2]
    return line_f1(asked.max(-1) > 0, shown.max(-1) > 0, MATCH * float(np.hypot(height, width)))


def line_f1(one: np.ndarray, other: np.ndarray, near: float) -> float:
    """F1 score of two line maps (bool [H, W]); pixels match within a distance of ``near`` pixels. 1 if both are empty.

    Harmonic mean of precision and recall, which are the fractions of matched pixels of each map.
    """
    if not one.any() or not other.any():
        return float(not one.any() and not other.any())
    matched = []
    for lines, reference in ((one, other), (other, one)):
        distance = cv2.distanceTransform((~reference).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        matched.append(float((distance[lines] <= near).mean()))
    return 2 * matched[0] * matched[1] / sum(matched) if sum(matched) else 0.0


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks, bool [H, W]; 1 if both are empty."""
    union = float((one | other).sum())
    return float((one & other).sum()) / union if union else 1.0


def mean_iou(one: np.ndarray, other: np.ndarray) -> float:
    """:func:`iou`, averaged over the labels in either map (int [H, W])."""
    labels = np.union1d(one, other)
    return float(np.mean([iou(one == label, other == label) for label in labels]))


def _color_labels(pixels: np.ndarray) -> np.ndarray:
    """Integer label of each pixel's RGB color, int [H, W] from uint8 [H, W, 3]."""
    rgb = pixels.astype(np.int64)
    labels: np.ndarray = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    return labels
