"""The order of the data: a function of seed and epoch, shared out exactly, resumed at any step."""

from __future__ import annotations

from collections import Counter

import pytest

from sdtune.data.order import FixedBatches, MicroBatches, Order, ScheduledSample
from sdtune.errors import UserError

BUCKETS = ((0, 3, 4, 8, 9, 10, 11), (1, 2), (5, 6, 7, 7, 7))
"""Seven, two and five entries; entry 7 is repeated three times."""

OF = {entry: number for number, bucket in enumerate(BUCKETS) for entry in bucket}


def epochs(order: Order, count: int) -> list[list[tuple[int, ...]]]:
    steps = order.steps_per_epoch
    return [[order.batch(epoch * steps + i) for i in range(steps)] for epoch in range(count)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 16])
def test_an_epoch_shows_every_entry_as_often_as_it_is_repeated_or_more(batch_size: int) -> None:
    order = Order(BUCKETS, batch_size, seed=0)
    for epoch in epochs(order, 4):
        seen = Counter(entry for batch in epoch for entry in batch)
        for entry, repeats in Counter(e for bucket in BUCKETS for e in bucket).items():
            assert seen[entry] >= repeats
        if batch_size == 1:
            assert seen == Counter(e for bucket in BUCKETS for e in bucket)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 16])
def test_a_batch_has_one_size_and_one_bucket(batch_size: int) -> None:
    order = Order(BUCKETS, batch_size, seed=1)
    assert order.steps_per_epoch == sum(-(-len(bucket) // batch_size) for bucket in BUCKETS)
    for epoch in epochs(order, 3):
        for batch in epoch:
            assert len(batch) == batch_size
            assert len({OF[entry] for entry in batch}) == 1


def test_a_batch_beyond_its_bucket_repeats_entries_as_evenly_as_it_can() -> None:
    batch = Order(((0, 1, 2),), 7, seed=0).batch(0)
    assert sorted(Counter(batch).values()) == [2, 2, 3]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    wide = (tuple(range(64)),)
    first = epochs(Order(wide, 4, seed=5), 3)
    assert epochs(Order(wide, 4, seed=5), 3) == first
    # Asked for from the end, and with other orders in between, it is still the same.
    again = Order(wide, 4, seed=5)
    backwards = [again.batch(step) for step in reversed(range(48))]
    [Order(wide, 4, seed=s).batch(step) for s in range(8) for step in (0, 20, 40)]
    assert backwards[::-1] == [batch for epoch in first for batch in epoch]
    assert first[0] != first[1] != first[2] != first[0]
    assert epochs(Order(wide, 4, seed=6), 1)[0] != first[0]


def test_batches_of_the_buckets_are_mixed() -> None:
    """Not one bucket after the other: over several epochs every bucket comes first once, and in the middle."""
    order = Order(tuple(tuple(range(10 * b, 10 * b + 8)) for b in range(3)), 2, seed=0)
    firsts = {epoch[0][0] // 10 for epoch in epochs(order, 20)}
    assert firsts == {0, 1, 2}
    assert any([b[0] // 10 for b in epoch] != sorted(b[0] // 10 for b in epoch) for epoch in epochs(order, 3))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 3), (3, 4), (12, 1)])
def test_processes_and_accumulation_part_the_same_global_batches(processes: int, accumulation: int) -> None:
    order = Order(BUCKETS, 12, seed=3)
    shares = [
        list(MicroBatches(order, steps=9, accumulation=accumulation, rank=rank, processes=processes))
        for rank in range(processes)
    ]
    micro = 12 // (processes * accumulation)
    for rank in shares:
        assert all(len(batch) == micro for batch in rank)
        assert len(rank) == 9 * accumulation
    for step in range(9):
        draws = [
            draw for rank in shares for batch in rank[step * accumulation : (step + 1) * accumulation] for draw in batch
        ]
        assert sorted(draws, key=lambda d: d.position) == [
            ScheduledSample(e, step, p) for p, e in enumerate(order.batch(step))
        ]


def test_a_resumed_run_goes_on_where_it_was_and_keeps_its_length() -> None:
    order = Order(BUCKETS, 4, seed=0)
    whole = MicroBatches(order, steps=20, accumulation=2, rank=1, processes=2)
    for start in (0, 1, 7, 19, 20):
        resumed = MicroBatches(order, steps=20, accumulation=2, rank=1, processes=2, start=lambda: start)  # noqa: B023
        assert len(resumed) == len(whole) == 40
        assert list(resumed) == list(whole)[2 * start :]
        assert len(resumed) == 40


def test_the_start_is_asked_for_when_iteration_begins() -> None:
    """Lightning makes the loader before it knows the step of the checkpoint."""
    place = {"step": 0}
    sampler = MicroBatches(Order(BUCKETS, 2, seed=0), steps=5, start=lambda: place["step"])
    place["step"] = 3
    assert [batch[0].step for batch in sampler] == [3, 4]


@pytest.mark.parametrize(("batch_size", "processes", "accumulation"), [(3, 2, 1), (3, 1, 2), (4, 3, 1), (2, 2, 2)])
def test_a_batch_that_cannot_be_shared_out_is_refused(batch_size: int, processes: int, accumulation: int) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size: {batch_size} .* a multiple of {processes * accumulation}"):
        MicroBatches(Order(BUCKETS, batch_size, 0), steps=1, accumulation=accumulation, processes=processes)


def test_validation_looks_at_every_entry_at_every_time_at_fixed_places() -> None:
    batches = FixedBatches([[0, 2], [1]], batch_size=4, times=3)
    assert len(batches) == len(list(batches)) == 3
    draws = [draw for batch in batches for draw in batch]
    assert [draw.entry for draw in draws] == [0, 0, 0, 2, 2, 2, 1, 1, 1]
    assert [draw.position for draw in draws] == list(range(9))
    assert {draw.step for draw in draws} == {0}
    assert all(len({draw.entry in (0, 2) for draw in batch}) == 1 for batch in batches)
    # The place of an image, and with it its noise, does not depend on the batch size.
    other = [draw for batch in FixedBatches([[0, 2], [1]], batch_size=1, times=3) for draw in batch]
    assert other == draws
