"""Aspect-ratio buckets: image sizes for training, so that all images of a batch have the same shape.

Follows ``make_bucket_resolutions`` of kohya's sd-scripts, but limits the aspect ratio instead of the side length.
All sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sdtune.errors import UserError

Size = tuple[int, int]


def bucket_sizes(resolution: int, step: int) -> list[Size]:
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
    return sorted(maximal | {(square, square)})


def assign(size: Size, resolution: int, step: int, name: str) -> Size:
    """Bucket of an image of ``size``: the one with the nearest aspect ratio (difference of logarithms).

    Images are never enlarged: an image that is smaller than this bucket gets the largest size that it covers under the
    same limits, usually its own sides rounded down to a multiple of ``step``.

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
    nearest = min(bucket_sizes(resolution, step), key=lambda bucket: _aspect_distance(bucket, size))
    if nearest[0] <= width and nearest[1] <= height:
        return nearest
    return max(_tallest(size, resolution**2, step), key=math.prod)


def _tallest(limit: Size, area: int, step: int) -> Iterator[Size]:
    """Yield, for each width, the tallest size within ``limit``, ``area`` and the aspect-ratio limits."""
    widest = min(limit[0], math.isqrt(2 * area))  # a wider size exceeds 2:1 or the area
    for width in range(step, widest + 1, step):
        height = min(limit[1], area // width, 2 * width) // step * step
        if width <= 2 * height:
            yield width, height


def _aspect_distance(first: Size, second: Size) -> float:
    # Logarithms of integers: swapping width and height of both sizes then gives exactly the same distance.
    return abs(math.log(first[0] * second[1]) - math.log(first[1] * second[0]))
