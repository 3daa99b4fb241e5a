"""Bucket sizes equal a brute-force enumeration of their definition; images get the nearest suitable bucket."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdtune.data.buckets import assign, assign_all, bucket_sizes
from sdtune.errors import UserError

GRIDS = [(64, 32), (64, 64), (100, 64), (256, 64), (500, 64), (512, 64), (512, 8), (768, 64), (1024, 64)]


def allowed(width: int, height: int, resolution: int) -> bool:
    return width * height <= resolution**2 and width <= 2 * height and height <= 2 * width


@pytest.mark.parametrize(("resolution", "step"), GRIDS)
def test_bucket_sizes_are_the_maximal_sizes_and_the_square(resolution: int, step: int) -> None:
    sides = range(step, 2 * resolution + 1, step)
    candidates = {(w, h) for w in sides for h in sides if allowed(w, h, resolution)}
    maximal = {(w, h) for w, h in candidates if (w + step, h) not in candidates and (w, h + step) not in candidates}
    side = resolution // step * step
    sizes = list(bucket_sizes(resolution, step))
    assert sizes == sorted(maximal | {(side, side)})
    assert {(h, w) for w, h in sizes} == set(sizes)


def test_bucket_sizes_equal_known_values() -> None:
    assert list(bucket_sizes(64, 32)) == [(64, 64)]  # pocket
    assert list(bucket_sizes(512, 64)) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


@pytest.mark.parametrize(("resolution", "step"), GRIDS)
def test_assigned_bucket_is_nearest_or_largest_that_fits(resolution: int, step: int) -> None:
    buckets = bucket_sizes(resolution, step)
    rng = np.random.default_rng(resolution + step)
    for _ in range(300):
        width, height = (int(side) for side in rng.integers(step, 3 * resolution, size=2))
        bucket = assign((width, height), resolution, step, "x.png")
        assert bucket[0] % step == bucket[1] % step == 0
        assert allowed(*bucket, resolution)
        assert bucket[0] <= width
        assert bucket[1] <= height
        assert assign((height, width), resolution, step, "x.png") == bucket[::-1]
        nearest = min(buckets, key=lambda b: abs(math.log(b[0] / b[1] * height / width)))
        if nearest[0] <= width and nearest[1] <= height:
            assert bucket == nearest
            continue
        sides = range(step, 2 * resolution + 1, step)
        fitting = [(w, h) for w in sides for h in sides if allowed(w, h, resolution) and w <= width and h <= height]
        assert bucket[0] * bucket[1] == max(w * h for w, h in fitting)


@pytest.mark.parametrize("resolution", [256, 500, 512, 1024])
def test_image_of_bucket_size_gets_this_bucket(resolution: int) -> None:
    for bucket in bucket_sizes(resolution, 64):
        assert assign(bucket, resolution, 64, "x.png") == bucket
        assert assign((5 * bucket[0], 5 * bucket[1]), resolution, 64, "x.png") == bucket


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 768), (384, 640)),  # the ratio 0.667 is nearer to 0.6 than to 0.778 in logarithms
        ((768, 512), (640, 384)),
        ((640, 384), (640, 384)),
        ((512, 512), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((6000, 1000), (640, 384)),
        ((300, 200), (256, 192)),  # the next images are too small for the nearest bucket: their sides are rounded down
        ((511, 511), (448, 448)),
        ((640, 383), (640, 320)),
        ((2000, 300), (512, 256)),  # limited to 2:1
        ((64, 64), (64, 64)),
        ((64, 3000), (64, 128)),
    ],
)
def test_assigned_bucket_equals_known_value(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert assign(size, 512, 64, "x.png") == bucket


@pytest.mark.parametrize("size", [(63, 500), (500, 63), (1, 1)])
def test_image_smaller_than_one_step_is_refused(size: tuple[int, int]) -> None:
    message = rf"^data\.path: tiny\.png is {size[0]}x{size[1]} pixels, the minimum is 64x64; "
    with pytest.raises(UserError, match=message):
        assign(size, 512, 64, "tiny.png")


def test_resolution_below_one_step_is_refused() -> None:
    message = r"^data\.resolution: 63 is less than the bucket step of 64 pixels; set at least 64$"
    with pytest.raises(UserError, match=message):
        bucket_sizes(63, 64)


def kohya_buckets(resolution: int, smallest: int = 256, largest: int = 2048, step: int = 64) -> set[tuple[int, int]]:
    """Bucket resolutions of kohya's sd-scripts: for each width, the tallest height of at most the area."""
    area = resolution**2
    square = math.isqrt(area) // step * step
    sizes = {(square, square)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return sizes


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_buckets_are_those_of_kohya_within_the_limits(resolution: int) -> None:
    """All of kohya's whose aspect is within 1:2 and 2:1, except those that can be one step longer."""

    def is_allowed(width: int, height: int) -> bool:
        return width * height <= resolution**2 and max(width, height) <= 2 * min(width, height)

    inside = {size for size in kohya_buckets(resolution) if is_allowed(*size)}
    longest = {(w, h) for w, h in inside if not is_allowed(w + 64, h) and not is_allowed(w, h + 64)}
    assert set(bucket_sizes(resolution, 64)) == longest | {(resolution, resolution)}


def test_all_images_are_assigned_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for resolution, step in ((64, 8), (512, 64), (1000, 64)):
        sizes = rng.integers(step, 4 * resolution, (3000, 2))
        expected = [assign((int(w), int(h)), resolution, step, "image") for w, h in sizes]
        assert [tuple(size) for size in assign_all(sizes, resolution, step).tolist()] == expected


def test_nearest_bucket_has_the_smallest_difference_of_logarithms() -> None:
    rng = np.random.default_rng(1)
    buckets = bucket_sizes(768, 64)
    for width, height in rng.integers(1600, 4000, (500, 2)).tolist():
        distances = [abs(math.log(w * height) - math.log(h * width)) for w, h in buckets]
        assert assign((width, height), 768, 64, "image") == buckets[distances.index(min(distances))]
