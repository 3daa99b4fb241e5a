"""Deterministic data order, a function of seed and step, and each process's share of it.

A run that is resumed at step s, or split over more processes, must train on the same samples in the same global
batches. Therefore nothing here has state: a batch is computed from its step alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from sdtune import streams
from sdtune.errors import UserError
from sdtune.randomness import generator


class ScheduledSample(NamedTuple):
    """Scheduled use of an entry (:class:`sdtune.data.entries.Entries`) at ``position`` in the batch of a ``step``.

    In validation the step is 0 and the position is that among all uses of validation samples. ``counts`` is False for
    the entries that fill the last batches of a validation that several processes share.
    """

    entry: int
    step: int
    position: int
    counts: bool = True


@dataclass(frozen=True, eq=False)
class Drawn:
    """Entries of one source of which a part is used in each epoch, another part in each.

    Args:
        stream: name of the source, which makes its draw independent of others.
        entries: int64 [N]; an entry with n repeats occurs n times.
        buckets: number of the bucket of each entry, int64 [N].
        count: entries per epoch, at most N.
    """

    stream: str
    entries: npt.NDArray[np.int64]
    buckets: npt.NDArray[np.int64]
    count: int

    def of_epoch(self, seed: int, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The entries that are used in ``epoch``, and their buckets, int64 [count] each."""
        rng = generator(seed, f"{streams.ORDER_DRAWN}{self.stream}", epoch)
        chosen = rng.permutation(len(self.entries))[: self.count]
        return self.entries[chosen], self.buckets[chosen]


class Order:
    """Order of the global batches: each batch is from one bucket, and every epoch shuffles entries and batches.

    Args:
        buckets: the entries of each bucket that are used in every epoch, int64 [N]; an entry with n repeats occurs n
            times.
        batch_size: samples per optimizer step, over all processes.
        seed: the run's seed.
        drawn: entries of which a part is used in each epoch, in addition.
    """

    def __init__(
        self,
        buckets: Sequence[npt.NDArray[np.int64]],
        batch_size: int,
        seed: int,
        drawn: Sequence[Drawn] = (),
    ) -> None:
        self.buckets, self.batch_size, self.seed, self.drawn = tuple(buckets), batch_size, seed, tuple(drawn)
        self._batches: dict[int, npt.NDArray[np.int64]] = {}
        self._ends: list[int] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch, and of all epochs unless entries are drawn: then a few more or less.

        Each epoch uses every entry at least once, except those that are drawn.
        """
        return self._steps(self._entries(0))

    def _steps(self, buckets: Sequence[npt.NDArray[np.int64]]) -> int:
        return sum(-(-len(bucket) // self.batch_size) for bucket in buckets)

    def _entries(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The entries of each bucket in ``epoch``."""
        parts = [[bucket] for bucket in self.buckets]
        for group in self.drawn:
            entries, buckets = group.of_epoch(self.seed, epoch)
            for number in np.unique(buckets).tolist():
                parts[number].append(entries[buckets == number])
        return [np.concatenate(part) if len(part) > 1 else part[0] for part in parts]

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of optimizer step ``step``, and the number of the step in it."""
        if not self.drawn:
            return divmod(step, self.steps_per_epoch)
        # The epochs have different numbers of steps, because the entries that are drawn are of different buckets.
        while not self._ends or self._ends[-1] <= step:
            steps = self._steps(self._entries(len(self._ends)))
            self._ends.append(steps + (self._ends[-1] if self._ends else 0))
        epoch = bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def batch(self, step: int) -> tuple[int, ...]:
        """Entries of optimizer step ``step``: ``batch_size`` entries of one bucket."""
        epoch, step_of_epoch = self._place(step)
        if epoch not in self._batches:
            self._batches = {epoch: self._shuffled(epoch)}
        return tuple(self._batches[epoch][step_of_epoch].tolist())

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        """The batches of ``epoch``, int64 [steps, batch_size]."""
        batches = []
        for number, entries in enumerate(self._entries(epoch)):
            if not len(entries):
                continue
            rng = generator(self.seed, f"{streams.ORDER_BUCKET}{number}", epoch)
            padded = -(-len(entries) // self.batch_size) * self.batch_size
            # Additional permutations of the bucket fill its last batch: with batches of equal size, the cost of a step
            # and the weight of a sample in the mean loss do not vary.
            permutations = -(-padded // len(entries))
            indices = np.concatenate([rng.permutation(entries) for _ in range(permutations)])[:padded]
            batches.append(indices.reshape(-1, self.batch_size))
        every = np.concatenate(batches)
        return every[generator(self.seed, streams.ORDER_BATCHES, epoch).permutation(len(every))]


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
            entries = self.order.batch(step)
            for micro_batch in range(self.accumulation):
                first = (micro_batch * self.processes + self.rank) * self.micro_batch_size
                yield [ScheduledSample(entries[p], step, p) for p in range(first, first + self.micro_batch_size)]


class FixedBatches(Sampler[list[ScheduledSample]]):
    """Batch sampler for validation, which the processes share.

    Noise and timestep depend on a sample's position, so fixed positions make them the same in every validation, for any
    number of processes. Every process has the same number of batches, as collective operations need; the batches that
    fill the last ones do not count.

    Args:
        buckets: entries of each bucket, each once.
        batch_size: samples per batch.
        times: number of uses of each entry.
        rank, processes: this process and the number of processes.
    """

    def __init__(
        self,
        buckets: Sequence[npt.NDArray[np.int64]],
        batch_size: int,
        times: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._times, self._buckets = times, buckets
        self._firsts = np.cumsum([0, *(len(bucket) * times for bucket in buckets)])
        spans = np.concatenate(
            [_spans(number, len(bucket) * times, batch_size) for number, bucket in enumerate(buckets)]
        )
        self._counted = len(spans[rank::processes])
        filling = np.repeat(spans[:1], -(-len(spans) // processes) - self._counted, axis=0)
        self._spans = np.concatenate([spans[rank::processes], filling])

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[list[ScheduledSample]]:
        for place, (number, first, last) in enumerate(self._spans.tolist()):
            yield [
                ScheduledSample(
                    int(self._buckets[number][use // self._times]),
                    0,
                    int(self._firsts[number]) + use,
                    place < self._counted,
                )
                for use in range(first, last)
            ]


def _spans(bucket: int, uses: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Number of the bucket, first and last use of each of its batches, int64 [N, 3]."""
    firsts = np.arange(0, uses, batch_size)
    return np.stack([np.full(len(firsts), bucket), firsts, np.minimum(firsts + batch_size, uses)], axis=1)
