"""Data order: a function of seed and epoch, partitioned over processes, resumable at any step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from sdtune.data.entries import Entries, Share, buckets_of
from sdtune.data.order import Drawn, FixedBatches, MicroBatches, ScheduledSample
from sdtune.data.order import Order as OrderOfBuckets
from sdtune.errors import UserError
from sdtune.randomness import generator

BUCKETS = ((0, 3, 4, 8, 9, 10, 11), (1, 2), (5, 6, 7, 7, 7))
"""Seven, two and five entries; entry 7 occurs three times."""


def Order(buckets: Sequence[Sequence[int]], batch_size: int, seed: int) -> OrderOfBuckets:  # noqa: N802
    return OrderOfBuckets([np.array(bucket) for bucket in buckets], batch_size, seed)


BUCKET_OF = {entry: number for number, bucket in enumerate(BUCKETS) for entry in bucket}


def epochs(order: OrderOfBuckets, count: int) -> list[list[tuple[int, ...]]]:
    steps = order.steps_per_epoch
    return [[order.batch(epoch * steps + i) for i in range(steps)] for epoch in range(count)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 16])
def test_epoch_uses_every_entry_at_least_as_often_as_its_repeats(batch_size: int) -> None:
    order = Order(BUCKETS, batch_size, seed=0)
    for epoch in epochs(order, 4):
        uses = Counter(entry for batch in epoch for entry in batch)
        for entry, repeats in Counter(e for bucket in BUCKETS for e in bucket).items():
            assert uses[entry] >= repeats
        if batch_size == 1:
            assert uses == Counter(e for bucket in BUCKETS for e in bucket)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 16])
def test_all_batches_have_the_same_size_and_one_bucket(batch_size: int) -> None:
    order = Order(BUCKETS, batch_size, seed=1)
    assert order.steps_per_epoch == sum(-(-len(bucket) // batch_size) for bucket in BUCKETS)
    for epoch in epochs(order, 3):
        for batch in epoch:
            assert len(batch) == batch_size
            assert len({BUCKET_OF[entry] for entry in batch}) == 1


def test_batch_larger_than_its_bucket_repeats_entries_evenly() -> None:
    batch = Order(((0, 1, 2),), 7, seed=0).batch(0)
    assert sorted(Counter(batch).values()) == [2, 2, 3]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    buckets = (tuple(range(64)),)
    reference = epochs(Order(buckets, 4, seed=5), 3)
    assert epochs(Order(buckets, 4, seed=5), 3) == reference
    # The batches do not depend on the order of the calls or on other Order objects.
    order = Order(buckets, 4, seed=5)
    backwards = [order.batch(step) for step in reversed(range(48))]
    [Order(buckets, 4, seed=s).batch(step) for s in range(8) for step in (0, 20, 40)]
    assert backwards[::-1] == [batch for epoch in reference for batch in epoch]
    assert reference[0] != reference[1] != reference[2] != reference[0]
    assert epochs(Order(buckets, 4, seed=6), 1)[0] != reference[0]


def test_batches_of_different_buckets_are_mixed() -> None:
    """An epoch does not use one bucket after the other: every bucket is first in some epoch."""
    order = Order(tuple(tuple(range(10 * b, 10 * b + 8)) for b in range(3)), 2, seed=0)
    first_buckets = {epoch[0][0] // 10 for epoch in epochs(order, 20)}
    assert first_buckets == {0, 1, 2}
    assert any([b[0] // 10 for b in epoch] != sorted(b[0] // 10 for b in epoch) for epoch in epochs(order, 3))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 3), (3, 4), (12, 1)])
def test_processes_and_micro_batches_partition_the_same_global_batches(processes: int, accumulation: int) -> None:
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
        samples = [
            s for rank in shares for batch in rank[step * accumulation : (step + 1) * accumulation] for s in batch
        ]
        assert sorted(samples, key=lambda s: s.position) == [
            ScheduledSample(e, step, p) for p, e in enumerate(order.batch(step))
        ]


def test_resumed_sampler_continues_at_its_step_and_keeps_its_length() -> None:
    order = Order(BUCKETS, 4, seed=0)
    full_run = MicroBatches(order, steps=20, accumulation=2, rank=1, processes=2)
    for start in (0, 1, 7, 19, 20):
        resumed = MicroBatches(order, steps=20, accumulation=2, rank=1, processes=2, start=lambda: start)  # noqa: B023
        assert len(resumed) == len(full_run) == 40
        assert list(resumed) == list(full_run)[2 * start :]
        assert len(resumed) == 40


def test_start_is_called_when_iteration_begins() -> None:
    """Lightning creates the loader before it knows the step of the checkpoint."""
    progress = {"step": 0}
    sampler = MicroBatches(Order(BUCKETS, 2, seed=0), steps=5, start=lambda: progress["step"])
    progress["step"] = 3
    assert [batch[0].step for batch in sampler] == [3, 4]


@pytest.mark.parametrize(("batch_size", "processes", "accumulation"), [(3, 2, 1), (3, 1, 2), (4, 3, 1), (2, 2, 2)])
def test_batch_size_that_cannot_be_split_is_refused(batch_size: int, processes: int, accumulation: int) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size: {batch_size} .* a multiple of {processes * accumulation}"):
        MicroBatches(Order(BUCKETS, batch_size, 0), steps=1, accumulation=accumulation, processes=processes)


def test_validation_uses_every_entry_the_set_number_of_times_at_fixed_positions() -> None:
    batches = FixedBatches([np.array([0, 2]), np.array([1])], batch_size=4, times=3)
    assert len(batches) == len(list(batches)) == 3
    samples = [sample for batch in batches for sample in batch]
    assert [sample.entry for sample in samples] == [0, 0, 0, 2, 2, 2, 1, 1, 1]
    assert [sample.position for sample in samples] == list(range(9))
    assert {sample.step for sample in samples} == {0}
    assert all(len({sample.entry in (0, 2) for sample in batch}) == 1 for batch in batches)
    # The position of a sample, and therefore its noise, does not depend on the batch size.
    single = [
        sample for batch in FixedBatches([np.array([0, 2]), np.array([1])], batch_size=1, times=3) for sample in batch
    ]
    assert single == samples


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_the_validation_batches(processes: int) -> None:
    buckets = [np.array([0, 2, 5]), np.array([1])]
    shares = [list(FixedBatches(buckets, 2, 3, rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1, "collective operations need equal numbers of batches"
    counted = sorted(sample for share in shares for batch in share for sample in batch if sample.counts)
    assert counted == sorted(sample for batch in FixedBatches(buckets, 2, 3) for sample in batch)
    assert all(len({sample.counts for sample in batch}) == 1 for share in shares for batch in share)


def test_drawn_entries_use_all_buckets_in_turn() -> None:
    """Three of ten entries per epoch, each in a bucket of its own: over the epochs, all are used alike."""
    drawn = Drawn("style", np.arange(10), np.arange(10), 3)
    order = OrderOfBuckets([np.zeros(0, np.int64)] * 10, 1, 0, [drawn])
    batches = [order.batch(step) for step in range(3 * 200)]
    counts = Counter(entry for batch in batches for entry in batch)
    assert set(counts) == set(range(10))
    assert min(counts.values()) > 35
    assert all(len(set(batches[3 * epoch : 3 * epoch + 3])) == 3 for epoch in range(200))


def test_epochs_of_different_lengths_are_found_from_the_step_alone() -> None:
    drawn = Drawn("style", np.arange(100, 110), np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2]), 4)
    buckets = [np.arange(5), np.arange(5, 8), np.zeros(0, np.int64)]

    def order() -> OrderOfBuckets:
        return OrderOfBuckets(buckets, 2, 7, [drawn])

    whole = order()
    batches = [whole.batch(step) for step in range(300)]
    assert len({whole._steps(whole._entries(epoch)) for epoch in range(20)}) > 1
    for step in (0, 17, 170, 299, 5):
        assert order().batch(step) == batches[step]
    first_epoch = [entry for batch in batches[: whole.steps_per_epoch] for entry in batch]
    assert set(first_epoch) >= set(range(8))
    assert len({entry for entry in first_epoch if entry >= 100}) == 4


def test_batch_of_a_million_entries_takes_a_tenth_of_a_millisecond() -> None:
    order = OrderOfBuckets([np.arange(600_000), np.arange(600_000, 1_000_000)], 4, 0)
    order.batch(0)
    start = time.perf_counter()
    for step in range(1000):
        order.batch(step)
    assert (time.perf_counter() - start) / 1000 < 1e-4


def former_epoch(buckets: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The order of version 0.1, which held lists."""
    batches: list[tuple[int, ...]] = []
    for number, bucket in enumerate(buckets):
        rng = generator(seed, f"order/bucket{number}", epoch)
        padded = -(-len(bucket) // batch_size) * batch_size
        permutations = -(-padded // len(bucket))
        indices = np.concatenate([rng.permutation(np.asarray(bucket)) for _ in range(permutations)])[:padded]
        batches += [tuple(int(i) for i in batch) for batch in indices.reshape(-1, batch_size)]
    shuffled = generator(seed, "order/batches", epoch).permutation(len(batches))
    return [batches[int(i)] for i in shuffled]


@pytest.mark.parametrize("count", [1_000, 1_000_000])
def test_batches_are_those_of_version_0_1(count: int) -> None:
    """Images of three sizes, some with repeats: from the arrays of sizes and repeats to the batches."""
    rng = np.random.default_rng(count)
    sizes = np.array([(64, 64), (96, 64), (64, 96)])[rng.integers(0, 3, count)]
    repeats = rng.integers(1, 3, count)
    entries = Entries(np.arange(count, dtype=np.int32), sizes, np.zeros(count, np.int16), repeats)
    buckets = buckets_of(entries, [Share()])
    former: dict[tuple[int, int], list[int]] = {}
    for index, (size, times) in enumerate(zip(map(tuple, sizes.tolist()), repeats.tolist(), strict=True)):
        former.setdefault(size, []).extend([index] * times)
    assert list(buckets.sizes) == sorted(former)
    order = OrderOfBuckets(buckets.fixed, 4, 3, buckets.drawn)
    expected = former_epoch([former[size] for size in sorted(former)], 4, 3, 1)
    steps = order.steps_per_epoch
    assert steps == len(expected)
    assert [order.batch(steps + step) for step in range(steps)] == expected
