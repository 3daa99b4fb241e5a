"""Aspect-ratio buckets: image sizes for training, so that all images of a batch have the same shape.

Follows ``make_bucket_resolutions`` of kohya's sd-scripts, but limits the aspect ratio instead of the side length.
All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sdtune.errors import UserError

Size = tuple[int, int]


@lru_cache(maxsize=64)
def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """Bucket sizes for a resolution, sorted by width.

    Sides are multiples of ``step``, the aspect ratio is between 1:2 and 2:1, and the area is at most ``resolution``
    squared. A size is omitted if a larger one (by ``step`` in one side) is within these limits. The largest square
    that fits is always included.

    Raises:
        UserError: ``resolution`` is below ``step``.
    """
    square = resolution // step * step
    if not square:
        raise UserError(
            f"{resolution} is less than the bucket step of {step} pixels",
            key="data.resolution",
            remedy=f"set at least {step}",
        )
    area = resolution**2
    maximal = {
        (width, height)
        for width, height in _tallest((2 * resolution, 2 * resolution), area, step)
        if (width + step) * height > area or width + step > 2 * height
    }
    return tuple(sorted(maximal | {(square, square)}))


def assign(size: Size, resolution: int, step: int, name: str) -> Size:
    """Bucket of one image; :func:`assign_all` states the rule.

    Raises:
        UserError: a side is shorter than ``step``; the message calls the image ``name``.
    """
    width, height = size
    if min(size) < step:
        raise UserError(
            f"{name} is {width}x{height} pixels, the minimum is {step}x{step}",
            key="data.path",
            remedy="remove or replace this image",
        )
    bucket = assign_all(np.array([size]), resolution, step)[0]
    return int(bucket[0]), int(bucket[1])


def assign_all(sizes: npt.NDArray[np.int64], resolution: int, step: int) -> npt.NDArray[np.int64]:
    """Buckets of images: for each, the bucket with the nearest aspect ratio (difference of logarithms).

    Images are never enlarged: an image that is smaller than this bucket gets the largest size that it covers under the
    same limits, usually its own sides rounded down to a multiple of ``step``.

    Args:
        sizes: (width, height) in pixels, int64 [N, 2]; no side is shorter than ``step``.

    Returns:
        (width, height) in pixels, int64 [N, 2].
    """
    # Photographs repeat few sizes, and crops of a million images about a hundred thousand.
    keys, inverse = np.unique(sizes[:, 0] << 32 | sizes[:, 1], return_inverse=True)
    distinct = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)
    nearest = _nearest(distinct, np.array(bucket_sizes(resolution, step)))
    for row in np.flatnonzero((nearest > distinct).any(axis=1)):
        width, height = map(int, distinct[row])
        nearest[row] = max(_tallest((width, height), resolution**2, step), key=math.prod)
    return nearest[inverse]


def _nearest(sizes: npt.NDArray[np.int64], buckets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The bucket of the nearest aspect ratio for each size; of two at the same distance, the first."""
    best = np.zeros(len(sizes), np.int64)
    smallest = np.full(len(sizes), np.inf)
    for number, (width, height) in enumerate(buckets):
        # Ratios of integers, where the larger is on top, have the order of the differences of logarithms. Swapping
        # width and height of both sizes gives exactly the same distance.
        first, second = width * sizes[:, 1], height * sizes[:, 0]
        distance = np.maximum(first, second) / np.minimum(first, second)
        closer = distance < smallest
        best[closer], smallest[closer] = number, distance[closer]
    return buckets[best]


def _tallest(limit: Size, area: int, step: int) -> Iterator[Size]:
    """Yield, for each width, the tallest size within ``limit``, ``area`` and the aspect-ratio limits."""
    widest = min(limit[0], math.isqrt(2 * area))  # a wider size exceeds 2:1 or the area
    for width in range(step, widest + 1, step):
        height = min(limit[1], area // width, 2 * width) // step * step
        if width <= 2 * height:
            yield width, height
