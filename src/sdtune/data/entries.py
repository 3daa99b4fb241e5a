"""Entries of a training: each image at each of its training sizes, with the source that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdtune.data.buckets import Size, assign, assign_all, bucket_sizes
from sdtune.data.order import Bucket, Drawn
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

    def size(self, size: Size, name: str) -> Size:
        """Training size of an image at the lowest resolution; ``name`` is its name for errors."""
        return assign(size, self.sides[0], self.steps[0], name)


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of all sources, as arrays with one element for each entry.

    Args:
        rows: index of the sample in the samples of its source, int64 [N].
        sizes: training size (width, height) in pixels, int64 [N, 2].
        sources: number of the source, int64 [N].
        repeats: uses per epoch, int64 [N].
    """

    rows: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    repeats: npt.NDArray[np.int64]

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
    rows = np.concatenate([kept for kept, _ in parts])
    return Entries(
        rows,
        np.concatenate([buckets for _, buckets in parts]),
        np.full(len(rows), source),
        samples.repeats[rows],
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


def buckets_of(entries: Entries, shares: Sequence[Share]) -> dict[tuple[Size, bool], Bucket]:
    """Buckets by training size (width, height) and whether they have pairs, sorted.

    A batch is from one bucket, so that its images have one shape, and all or none of them have a class image.
    """
    lengths = [int(entries.repeats[entries.sources == number].sum()) for number in range(len(shares))]
    pairs = np.array([share.has_pairs for share in shares])[entries.sources]
    keys = (entries.sizes[:, 0] << 33) | (entries.sizes[:, 1] << 1) | pairs
    buckets = {}
    grouped = _groups(keys)
    parts = {number: _parts(entries, number, share, max(lengths), grouped) for number, share in enumerate(shares)}
    for place, (key, members) in enumerate(grouped):
        fixed, drawn = [], []
        for number in np.unique(entries.sources[members]).tolist():
            own = members[entries.sources[members] == number]
            whole, count = parts[number].get(place, (1, 0))
            repeated = np.repeat(own, entries.repeats[own])
            fixed += [repeated] * whole
            if count:
                drawn.append(Drawn(f"{shares[number].name}/{key}", repeated, count))
        size = (key >> 33, key >> 1 & 0xFFFFFFFF)
        if fixed or drawn:
            buckets[size, bool(key & 1)] = Bucket(np.concatenate(fixed) if fixed else np.zeros(0, np.int64), (*drawn,))
    return buckets


def _groups(keys: npt.NDArray[np.int64]) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Distinct keys, sorted, each with the indices that have it, ascending."""
    order = np.argsort(keys, kind="stable")
    distinct, firsts = np.unique(keys[order], return_index=True)
    return list(zip(distinct.tolist(), np.split(order, firsts[1:]), strict=True))


def _parts(
    entries: Entries, source: int, share: Share, largest: int, grouped: Sequence[tuple[int, npt.NDArray[np.int64]]]
) -> dict[int, tuple[int, int]]:
    """For each bucket of a source, how often it is used whole, and how many of its entries are drawn in addition.

    The number of entries of a bucket is the same in all epochs, so all epochs have the same number of steps: the part
    that is drawn is divided over the buckets by the method of largest remainders.
    """
    if share.weight is None:
        return {}
    counts = {}
    for place, (_, members) in enumerate(grouped):
        own = members[entries.sources[members] == source]
        if len(own):
            counts[place] = int(entries.repeats[own].sum())
    total = sum(counts.values())
    whole, rest = divmod(max(1, round(share.weight * largest)), total)
    exact = {place: rest * count / total for place, count in counts.items()}
    drawn = {place: int(value) for place, value in exact.items()}
    by_remainder = sorted(exact, key=lambda place: (drawn[place] - exact[place], place))
    for place in by_remainder[: rest - sum(drawn.values())]:
        drawn[place] += 1
    return {place: (whole, drawn[place]) for place in counts}
