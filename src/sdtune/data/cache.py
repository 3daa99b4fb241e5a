"""Caches of latents and text states on disk, keyed by content.

A key holds the image's bytes, its size, crop and flip, and the hash of the weights that encode it, so an edited
image or another VAE never meets a stale entry. Entries are shared by all runs of a user.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch
from cachetools import LRUCache, cached
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtune.errors import UserError
from sdtune.files import replacing

T = TypeVar("T")


class TensorCache:
    """One tensor a file under ``folder``; written whole or not at all, so processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def get(self, key: str) -> Tensor:
        """The tensor of ``key``; UserError naming the file if it cannot be read."""
        try:
            return _read(self.path(key))
        except SafetensorError as error:
            raise UserError(
                f"{self.path(key)}: a damaged cache entry ({error})", remedy="delete it and run again"
            ) from error

    def put(self, key: str, value: Tensor) -> None:
        with replacing(self.path(key), sync=False) as partial:
            save_file({"value": value.contiguous().cpu()}, partial)

    @torch.no_grad()
    def fill(
        self,
        items: Mapping[str, T],
        encode: Callable[[Sequence[T]], Tensor],
        *,
        batch_size: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Encode what is missing among ``items`` (key -> what to encode), ``batch_size`` at a time.

        A result that is not finite fails at once and names its item: it is never zeroed.
        """
        missing = [key for key in items if key not in self]
        for first in range(0, len(missing), batch_size):
            keys = missing[first : first + batch_size]
            for key, value in zip(keys, encode([items[key] for key in keys]), strict=True):
                if not torch.isfinite(value).all():
                    raise UserError(
                        f"{items[key]}: the encoder's output is not finite; the image or the weights are damaged"
                    )
                self.put(key, value)
            progress(len(keys))


KEPT_BYTES = 128 * 2**20


@cached(LRUCache(KEPT_BYTES, getsizeof=lambda value: value.nbytes), lock=Lock())
def _read(path: Path) -> Tensor:
    """Keeps what was read last, at most :data:`KEPT_BYTES` in each process.

    A few images are read again and again, in a sweep on one backbone by every run.
    """
    return load_file(path)["value"]


def share(keys: Iterable[str], rank: int, processes: int) -> list[str]:
    """The keys that process ``rank`` fills."""
    return list(keys)[rank::processes]
