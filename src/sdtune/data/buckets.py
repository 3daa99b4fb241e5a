"""Aspect-ratio buckets: the sizes that images are cropped to, so that a batch has one shape.

The sizes follow kohya's sd-scripts (``make_bucket_resolutions``), with the aspect bounded instead of the side.
Every size here is (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sdtune.errors import UserError

Size = tuple[int, int]


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """The sizes for images that are large enough, narrowest first.

    Sides are multiples of ``step``, the aspect is within 1:2 and 2:1, the area at most ``resolution`` squared, and no
    side could be a step longer. The largest square that fits is always one of them.

    Raises:
        UserError: ``resolution`` is below ``step``.
    """
    square = resolution // step * step
    if not square:
        raise UserError(
            f"{resolution} is less than one step of {step} pixels: give {step} or more", key="data.resolution"
        )
    area = resolution**2
    maximal = {
        (width, height)
        for width, height in _tallest((2 * resolution, 2 * resolution), area, step)
        if (width + step) * height > area or width + step > 2 * height
    }
    return sorted(maximal | {(square, square)})


def assign(size: Size, resolution: int, step: int, name: str) -> Size:
    """The bucket of an image of ``size``: the one of nearest aspect (by log ratio).

    An image that would have to be enlarged for it gets the largest size that it fills as it is, under the same rules:
    mostly its own sides, rounded down to ``step``.

    Raises:
        UserError: a side is shorter than ``step``; names the image by ``name``.
    """
    width, height = size
    if min(size) < step:
        raise UserError(
            f"{name} is {width}x{height} pixels, too small to train on: remove it or replace it"
            f" with one of at least {step}x{step}",
            key="data.path",
        )
    nearest = min(bucket_sizes(resolution, step), key=lambda bucket: _aspect_distance(bucket, size))
    if nearest[0] <= width and nearest[1] <= height:
        return nearest
    return max(_tallest(size, resolution**2, step), key=math.prod)


def _tallest(limit: Size, area: int, step: int) -> Iterator[Size]:
    """For each width the tallest size within ``limit``, ``area`` and the aspects."""
    widest = min(limit[0], math.isqrt(2 * area))  # wider than this is beyond 2:1 or over the area
    for width in range(step, widest + 1, step):
        height = min(limit[1], area // width, 2 * width) // step * step
        if width <= 2 * height:
            yield width, height


def _aspect_distance(one: Size, other: Size) -> float:
    # Logarithms of whole numbers, so that an image and the same on its side have exactly the same distances.
    return abs(math.log(one[0] * other[1]) - math.log(one[1] * other[0]))
