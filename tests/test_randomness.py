"""Draws as functions of (seed, stream, step, position)."""

from __future__ import annotations

import numpy as np
import pytest

from sdtune.randomness import generator

Place = tuple[int, str, int, int]


def drawn(place: Place, count: int = 16) -> np.ndarray:
    return generator(*place).integers(2**63, size=count)


@pytest.mark.parametrize("place", [(0, "noise", 0, 0), (1, "order", 7, 3), (2**70, "", 2**40, 2**40)])
def test_the_same_place_gives_the_same_draw(place: Place) -> None:
    first = drawn(place)
    generator(*place).random(1000)  # a generator that is used up elsewhere changes nothing
    drawn((5, "other", 5, 5))
    assert np.array_equal(drawn(place), first)


@pytest.mark.parametrize(
    "neighbour",
    [
        (1, "noise", 5, 3),
        (0, "timestep", 5, 3),
        (0, "noise", 6, 3),
        (0, "noise", 4, 3),
        (0, "noise", 5, 4),
        (0, "noise", 5, 2),
        (0, "noise", 3, 5),
    ],
)
def test_a_neighbouring_place_gives_another_draw(neighbour: Place) -> None:
    assert not np.isin(drawn(neighbour, 1000), drawn((0, "noise", 5, 3), 1000)).any()


def test_neighbouring_steps_and_positions_do_not_overlap() -> None:
    """The draws of one place, however many, never run into those of the next: 262,144 words each, all different."""
    places = [(0, "noise", step, position) for step in (0, 1, 2) for position in (0, 1)]
    words = np.concatenate([generator(*place).integers(2**64, size=2**18, dtype=np.uint64) for place in places])
    assert len(np.unique(words)) == len(words)


def test_seed_and_stream_are_not_run_together() -> None:
    assert not np.array_equal(drawn((1, "1/a", 0, 0)), drawn((11, "a", 0, 0)))
    assert not np.array_equal(drawn((1, "2", 0, 0)), drawn((12, "", 0, 0)))


def test_streams_and_positions_are_uncorrelated() -> None:
    count = 4096
    rows = [generator(0, stream, 0, p).standard_normal(count) for stream in ("noise", "vae") for p in range(8)]
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 6 / count**0.5
    # And along the steps, for one position.
    along = np.array([generator(0, "noise", step, 0).standard_normal() for step in range(2000)])
    assert abs(np.corrcoef(along[:-1], along[1:])[0, 1]) < 6 / len(along) ** 0.5
    assert abs(along.mean()) < 6 / len(along) ** 0.5
    assert along.std() == pytest.approx(1, abs=0.1)


def test_seeds_beyond_32_bits_differ() -> None:
    seeds = [1, 1 + 2**32, 1 + 2**33, 1 + 2**64, 1 + 2**128]
    assert len({drawn((seed, "noise", 0, 0)).tobytes() for seed in seeds}) == len(seeds)


def test_the_draws_are_these() -> None:
    """Pinned: a change of the function would silently change every run that is resumed."""
    assert generator(0, "noise").bit_generator.random_raw(2).tolist() == [18222285687628429512, 627592827463030234]
    assert generator(1, "train/timestep", 5, 2).bit_generator.random_raw(2).tolist() == [
        703542458542763307,
        1557772776316607460,
    ]
