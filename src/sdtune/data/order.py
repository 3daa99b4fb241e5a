"""Deterministic data order, a function of seed and step, and each process's share of it.

A run that is resumed at step s, or split over more processes, must train on the same samples in the same global
batches. Therefore nothing here has state: a batch is computed from its step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from sdtune import streams
from sdtune.errors import UserError
from sdtune.randomness import generator


class ScheduledSample(NamedTuple):
    """Scheduled use of a sample: its index in the samples, optimizer ``step``, ``position`` in the batch of the step.

    In validation the step is 0 and the position is that among all uses of validation samples.
    """

    sample_index: int
    step: int
    position: int


@dataclass(frozen=True)
class Order:
    """Order of the global batches: each batch is from one bucket, and every epoch shuffles samples and batches.

    Args:
        buckets: the sample indices of each bucket; a sample with n repeats occurs n times.
        batch_size: samples per optimizer step, over all processes.
        seed: the run's seed.
    """

    buckets: tuple[tuple[int, ...], ...]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; each epoch uses every sample at least once."""
        return sum(-(-len(bucket) // self.batch_size) for bucket in self.buckets)

    def batch(self, step: int) -> tuple[int, ...]:
        """Sample indices of optimizer step ``step``: ``batch_size`` samples of one bucket."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return _epoch(self, epoch)[step_of_epoch]


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> list[tuple[int, ...]]:
    batches: list[tuple[int, ...]] = []
    for number, bucket in enumerate(order.buckets):
        rng = generator(order.seed, f"{streams.ORDER_BUCKET}{number}", epoch)
        padded = -(-len(bucket) // order.batch_size) * order.batch_size
        # Additional permutations of the bucket fill its last batch: with batches of equal size, the cost of a step and
        # the weight of a sample in the mean loss do not vary.
        permutations = -(-padded // len(bucket))
        indices = np.concatenate([rng.permutation(np.asarray(bucket)) for _ in range(permutations)])[:padded]
        batches += [tuple(int(i) for i in batch) for batch in indices.reshape(-1, order.batch_size)]
    shuffled = generator(order.seed, streams.ORDER_BATCHES, epoch).permutation(len(batches))
    return [batches[int(i)] for i in shuffled]


class MicroBatches(Sampler[list[ScheduledSample]]):
    """Batch sampler of one process for a complete run.

    ``len`` is the number of micro-batches of the complete run, also in a resumed run, where iteration starts at step
    ``start()``. With a smaller length, Lightning would repeat batches.

    Args:
        order: the global batches.
        steps: optimizer steps of the run.
        accumulation: micro-batches per step.
        rank, processes: this process and the number of processes.
        start: returns the first optimizer step; called when iteration begins.
    """

    def __init__(
        self,
        order: Order,
        *,
        steps: int,
        accumulation: int = 1,
        rank: int = 0,
        processes: int = 1,
        start: Callable[[], int] = lambda: 0,
    ) -> None:
        micro_batch_size, remainder = divmod(order.batch_size, accumulation * processes)
        if remainder or not micro_batch_size:
            raise UserError(
                f"{order.batch_size} samples per step cannot be split over {processes} process(es)"
                f" x {accumulation} micro-batches",
                key="data.batch_size",
                remedy=f"set a multiple of {accumulation * processes}",
            )
        self.order, self.steps, self.accumulation = order, steps, accumulation
        self.rank, self.processes, self.start, self.micro_batch_size = rank, processes, start, micro_batch_size

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[ScheduledSample]]:
        for step in range(self.start(), self.steps):
            indices = self.order.batch(step)
            for micro_batch in range(self.accumulation):
                first = (micro_batch * self.processes + self.rank) * self.micro_batch_size
                yield [ScheduledSample(indices[p], step, p) for p in range(first, first + self.micro_batch_size)]


class FixedBatches(Sampler[list[ScheduledSample]]):
    """Batch sampler for validation, the same on every process.

    Noise and timestep depend on a sample's position, so fixed positions make them the same in every validation.

    Args:
        buckets: sample indices of each bucket.
        batch_size: samples per batch.
        times: number of uses of each sample.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], batch_size: int, times: int) -> None:
        batches: list[list[ScheduledSample]] = []
        position = 0
        for bucket in buckets:
            samples = [
                ScheduledSample(index, 0, position + k)
                for k, index in enumerate(i for i in bucket for _ in range(times))
            ]
            position += len(samples)
            batches += [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[ScheduledSample]]:
        return iter(self._batches)
