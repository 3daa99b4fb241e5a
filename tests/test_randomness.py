"""Random numbers are functions of (seed, stream, step, position)."""

from __future__ import annotations

import numpy as np
import pytest

from sdtune.randomness import generator

Key = tuple[int, str, int, int]


def drawn(key: Key, count: int = 16) -> np.ndarray:
    return generator(*key).integers(2**63, size=count)


@pytest.mark.parametrize("key", [(0, "noise", 0, 0), (1, "order", 7, 3), (2**70, "", 2**40, 2**40)])
def test_same_key_gives_the_same_numbers(key: Key) -> None:
    first = drawn(key)
    generator(*key).random(1000)  # use of another generator must have no influence
    drawn((5, "other", 5, 5))
    assert np.array_equal(drawn(key), first)


@pytest.mark.parametrize(
    "neighbor",
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
def test_neighboring_key_gives_other_numbers(neighbor: Key) -> None:
    assert not np.isin(drawn(neighbor, 1000), drawn((0, "noise", 5, 3), 1000)).any()


def test_sequences_of_neighboring_keys_do_not_overlap() -> None:
    """262,144 words of each of six keys are all different."""
    keys = [(0, "noise", step, position) for step in (0, 1, 2) for position in (0, 1)]
    words = np.concatenate([generator(*key).integers(2**64, size=2**18, dtype=np.uint64) for key in keys])
    assert len(np.unique(words)) == len(words)


def test_seed_and_stream_are_separated_in_the_key() -> None:
    assert not np.array_equal(drawn((1, "1/a", 0, 0)), drawn((11, "a", 0, 0)))
    assert not np.array_equal(drawn((1, "2", 0, 0)), drawn((12, "", 0, 0)))


def test_streams_and_positions_are_uncorrelated() -> None:
    count = 4096
    rows = [generator(0, stream, 0, p).standard_normal(count) for stream in ("noise", "vae") for p in range(8)]
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 6 / count**0.5
    # The numbers of one position are also uncorrelated along the steps.
    by_step = np.array([generator(0, "noise", step, 0).standard_normal() for step in range(2000)])
    assert abs(np.corrcoef(by_step[:-1], by_step[1:])[0, 1]) < 6 / len(by_step) ** 0.5
    assert abs(by_step.mean()) < 6 / len(by_step) ** 0.5
    assert by_step.std() == pytest.approx(1, abs=0.1)


def test_seeds_beyond_32_bits_differ() -> None:
    seeds = [1, 1 + 2**32, 1 + 2**33, 1 + 2**64, 1 + 2**128]
    assert len({drawn((seed, "noise", 0, 0)).tobytes() for seed in seeds}) == len(seeds)


def test_random_numbers_equal_reference_values() -> None:
    """A change of the generator would silently change every resumed run."""
    assert generator(0, "noise").bit_generator.random_raw(2).tolist() == [18222285687628429512, 627592827463030234]
    assert generator(1, "train/timestep", 5, 2).bit_generator.random_raw(2).tolist() == [
        703542458542763307,
        1557772776316607460,
    ]
