"""Order of the data as a function of (seed, epoch), and each process's part of it.

Order decides resume and equality: a run resumed at step s, or split over more processes, must see the same samples in
the same global batches. So nothing here has a state; a batch is found from its step alone.
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
    """One sample's place: which ``entry`` of the data, in which optimizer ``step``, at which ``position`` in it."""

    entry: int
    step: int
    position: int


@dataclass(frozen=True)
class Order:
    """Global batches over buckets: each batch has one shape, and every epoch permutes images and batches anew.

    Args:
        buckets: for each bucket the entries that belong to it (an entry repeated n times stands n times).
        batch_size: samples per optimizer step, over all processes.
        seed: the run's seed.
    """

    buckets: tuple[tuple[int, ...], ...]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every entry is seen at least once."""
        return sum(-(-len(bucket) // self.batch_size) for bucket in self.buckets)

    def batch(self, step: int) -> tuple[int, ...]:
        """The entries of optimizer step ``step``, ``batch_size`` of them, all of one bucket."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return _epoch(self, epoch)[place]


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> list[tuple[int, ...]]:
    batches: list[tuple[int, ...]] = []
    for number, bucket in enumerate(order.buckets):
        rng = generator(order.seed, f"{streams.ORDER_BUCKET}{number}", epoch)
        whole = -(-len(bucket) // order.batch_size) * order.batch_size
        # A last batch that is not full goes on with further permutations of its bucket: a batch has one size, so that
        # the step's cost and the mean of its losses do not vary.
        rows = -(-whole // len(bucket))
        entries = np.concatenate([rng.permutation(np.asarray(bucket)) for _ in range(rows)])[:whole]
        batches += [tuple(int(e) for e in part) for part in entries.reshape(-1, order.batch_size)]
    shuffled = generator(order.seed, streams.ORDER_BATCHES, epoch).permutation(len(batches))
    return [batches[int(i)] for i in shuffled]


class MicroBatches(Sampler[list[ScheduledSample]]):
    """One process's micro-batches of a whole run.

    ``len`` is the whole run also after a resume, and ``iter`` starts at the offset: a length that shrinks makes
    Lightning replay data.

    Args:
        order: the global batches.
        steps: optimizer steps of the run.
        accumulation: micro-batches per step.
        rank, processes: which share is wanted.
        start: gives the optimizer step to begin with, asked when iteration begins.
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
        micro, rest = divmod(order.batch_size, accumulation * processes)
        if rest or not micro:
            raise UserError(
                f"{order.batch_size} samples per step cannot be shared out over {processes}"
                f" process(es) x {accumulation} accumulation steps",
                key="data.batch_size",
                remedy=f"choose a multiple of {accumulation * processes}",
            )
        self.order, self.steps, self.accumulation = order, steps, accumulation
        self.rank, self.processes, self.start, self.micro = rank, processes, start, micro

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[ScheduledSample]]:
        for step in range(self.start(), self.steps):
            entries = self.order.batch(step)
            for turn in range(self.accumulation):
                first = (turn * self.processes + self.rank) * self.micro
                yield [ScheduledSample(entries[p], step, p) for p in range(first, first + self.micro)]


class FixedBatches(Sampler[list[ScheduledSample]]):
    """Validation: every entry ``times`` times at fixed places, so that its draws are the same at each call."""

    def __init__(self, buckets: Sequence[Sequence[int]], batch_size: int, times: int) -> None:
        draws: list[list[ScheduledSample]] = []
        position = 0
        for bucket in buckets:
            places = [
                ScheduledSample(entry, 0, position + k)
                for k, entry in enumerate(e for e in bucket for _ in range(times))
            ]
            position += len(places)
            draws += [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
        self.draws = draws

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[list[ScheduledSample]]:
        return iter(self.draws)
