"""Entries of a training: each image at each of its training sizes, with the source that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdtune.data.buckets import Size, assign, assign_all, bucket_sizes
from sdtune.data.order import Drawn
from sdtune.data.samples import SampleSequence


@dataclass(frozen=True)
class Resolutions:
    """Resolutions of a source, with the step of their buckets.

    Args:
        sides: resolutions in pixels, ascending; an image stands once for each.
        steps: step between the sides of the buckets of each resolution, in pixels.
    """

    sides: tuple[int, ...]
    steps: tuple[int, ...]

    def largest_size(self, size: Size, name: str) -> Size:
        """Largest training size (width, height) of an image of ``size``; ``name`` is its name for errors."""
        for side, step in zip(self.sides[:0:-1], self.steps[:0:-1], strict=True):
            if min(size) >= step and (bucket := assign(size, side, step, name)) in bucket_sizes(side, step):
                return bucket
        return assign(size, self.sides[0], self.steps[0], name)


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of all sources, as arrays with one element for each entry.

    Args:
        rows: index of the sample in the samples of its source, int32 [N].
        sizes: training size (width, height) in pixels, int32 [N, 2].
        sources: number of the source, int16 [N].
        repeats: uses per epoch, int32 [N].
    """

    rows: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    sources: npt.NDArray[np.int16]
    repeats: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    def size(self, entry: int) -> Size:
        """Training size (width, height) of ``entry``."""
        width, height = self.sizes[entry].tolist()
        return width, height


def entries_of(samples: SampleSequence, resolutions: Resolutions, source: int = 0) -> Entries:
    """Entries of the ``samples`` of one source.

    At the lowest resolution every image has an entry, and a small one is trained at its own size
    (:func:`sdtune.data.buckets.assign_all`). At the others, an image that is smaller than its bucket has none.

    Raises:
        UserError: an image is smaller than the step of the buckets.
    """
    sizes = samples.sizes
    parts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for number, (side, step) in enumerate(zip(resolutions.sides, resolutions.steps, strict=True)):
        kept = np.arange(len(sizes))
        if number:
            kept = kept[(sizes >= step).all(axis=1)]
        elif (small := (sizes < step).any(axis=1)).any():
            index = int(np.argmax(small))
            assign((int(sizes[index, 0]), int(sizes[index, 1])), side, step, str(samples[index]))
        buckets = assign_all(sizes[kept], side, step)
        if number:
            known = {width << 32 | height for width, height in bucket_sizes(side, step)}
            whole = np.isin(buckets[:, 0] << 32 | buckets[:, 1], list(known))
            kept, buckets = kept[whole], buckets[whole]
        parts.append((kept, buckets))
    rows = np.concatenate([kept for kept, _ in parts]).astype(np.int32)
    return Entries(
        rows,
        np.concatenate([buckets for _, buckets in parts]).astype(np.int32),
        np.full(len(rows), source, np.int16),
        samples.repeats[rows].astype(np.int32),
    )


def join_entries(parts: Sequence[Entries]) -> Entries:
    """The entries of several sources, one after the other."""
    return Entries(*(np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS))


_ARRAYS = ("rows", "sizes", "sources", "repeats")


@dataclass(frozen=True)
class Share:
    """How much of an epoch a source gets.

    Args:
        name: name of the source.
        weight: entries relative to those of the largest source; None: each entry as often as its repeats.
        has_pairs: whether its samples are pairs of a subject image and a class image.
    """

    name: str = ""
    weight: float | None = None
    has_pairs: bool = False


@dataclass(frozen=True, eq=False)
class Buckets:
    """Buckets of entries. A batch is from one, so that its images have one shape, and all or none have a class image.

    Args:
        sizes: training size (width, height) of each bucket, ascending; a size occurs twice with and without pairs.
        fixed: entries of each bucket that are used in every epoch, int64 [N]; with n repeats n times.
        drawn: entries of which a part is used in each epoch.
    """

    sizes: tuple[Size, ...]
    fixed: tuple[npt.NDArray[np.int64], ...]
    drawn: tuple[Drawn, ...] = ()

    def entries(self, number: int) -> npt.NDArray[np.int64]:
        """All entries of a bucket, each once, int64 [N]."""
        drawn = [group.entries[group.buckets == number] for group in self.drawn]
        return np.unique(np.concatenate([self.fixed[number], *drawn]))

    def images_by_size(self) -> dict[Size, int]:
        """Number of images of each training size (width, height)."""
        counts: dict[Size, int] = {}
        for number, size in enumerate(self.sizes):
            counts[size] = counts.get(size, 0) + len(self.entries(number))
        return counts

    def uses(self, number: int) -> float:
        """Mean number of uses of entries of a bucket per epoch."""
        drawn = [(group.buckets == number).mean() * group.count for group in self.drawn]
        return len(self.fixed[number]) + float(sum(drawn))


def buckets_of(entries: Entries, shares: Sequence[Share]) -> Buckets:
    """Buckets by training size and whether their samples have class images.

    Args:
        shares: of each source.
    """
    pairs = np.array([share.has_pairs for share in shares])[entries.sources]
    keys = (entries.sizes[:, 0].astype(np.int64) << 33) | (entries.sizes[:, 1].astype(np.int64) << 1) | pairs
    distinct, buckets = np.unique(keys, return_inverse=True)
    lengths = [int(entries.repeats[entries.sources == number].sum()) for number in range(len(shares))]
    fixed: list[list[npt.NDArray[np.int64]]] = [[] for _ in distinct]
    drawn = []
    for number, share in enumerate(shares):
        own = np.flatnonzero(entries.sources == number)
        repeated = np.repeat(own, entries.repeats[own])
        times, rest = 1, 0
        if share.weight is not None:
            times, rest = divmod(max(1, round(share.weight * max(lengths))), lengths[number])
        if rest:
            drawn.append(Drawn(share.name, repeated, buckets[repeated], rest))
        for bucket, members in _groups(buckets[repeated]):
            fixed[bucket] += [repeated[members]] * times
    return Buckets(
        tuple((key >> 33, key >> 1 & 0xFFFFFFFF) for key in distinct.tolist()),
        tuple(np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in fixed),
        tuple(drawn),
    )


def _groups(keys: npt.NDArray[np.int64]) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Distinct keys, sorted, each with the indices that have it, ascending."""
    order = np.argsort(keys, kind="stable")
    if not len(keys):
        return []  # np.split of an empty array has one part
    distinct, firsts = np.unique(keys[order], return_index=True)
    return list(zip(distinct.tolist(), np.split(order, firsts[1:]), strict=True))
