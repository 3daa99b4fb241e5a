"""Disk caches of latents and text embeddings, keyed by content.

Latent moments are identified by the image's hash, size and flip (the crop is always the center) and by the VAE's
weights, config and precision; text embeddings by the prompt and by the text encoder's weights, config, tokenizer,
settings and precision. So an edited image or another VAE never matches an old entry. All runs of a user share the
entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch
from cachetools import LRUCache, cached
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sdtune.errors import UserError
from sdtune.files import mark_used, replacing

T = TypeVar("T")


class TensorCache:
    """Disk cache of encoder outputs under ``folder``, one file of named tensors per key.

    Writes are atomic, so processes may share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def get(self, key: str) -> dict[str, Tensor]:
        """Read the tensors of ``key``; the caller must not change the result.

        Raises:
            UserError: the file is damaged; the message names it.
        """
        try:
            return _read(self.path(key))
        except SafetensorError as error:
            raise UserError(
                f"{self.path(key)}: damaged cache entry ({error})", remedy="delete this file and run again"
            ) from error

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        content = save({name: value.contiguous().cpu() for name, value in tensors.items()})
        try:
            # safetensors' own file writer reports a full disk as an error without errno.
            with replacing(self.path(key), sync=False) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path(key))) from error

    @torch.no_grad()
    def fill(
        self,
        items: Mapping[str, T],
        encode: Callable[[Sequence[T]], Sequence[Mapping[str, Tensor]]],
        *,
        batch_size: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Encode and store the ``items`` (cache key -> encoder input) that are missing, ``batch_size`` at a time.

        A batch with a missing item is encoded completely: the last bits of an output depend on the size of its batch,
        and a run that was interrupted here must get the same values when it is resumed.

        Raises:
            UserError: an output is not finite; the message names its item, and the output is not stored.
        """
        all_keys = list(items)
        for first in range(0, len(all_keys), batch_size):
            keys = all_keys[first : first + batch_size]
            missing = {key for key in keys if key not in self}
            for key in set(keys) - missing:
                mark_used(self.path(key))
            if not missing:
                continue
            for key, tensors in zip(keys, encode([items[key] for key in keys]), strict=True):
                if key not in missing:
                    continue
                if not all(torch.isfinite(value).all() for value in tensors.values()):
                    raise UserError(
                        f"{items[key]}: the encoder output is not finite",
                        remedy="check this input and the weights of the encoder for damage",
                    )
                self.put(key, tensors)
            progress(len(missing))


@dataclass(frozen=True)
class EncoderCaches:
    """Caches of encoder outputs; those that are None are computed in each step.

    Args:
        latents: moments of the VAE's posterior.
        text: text embeddings.
        conditions: encoded conditions, such as control maps.
        waiting: hidden states of the text encoders that wait in main memory, if others are trained.
    """

    latents: TensorCache | None = None
    text: TensorCache | None = None
    conditions: TensorCache | None = None
    waiting: TensorCache | None = None

    def waiting_states(self, prompt: str) -> Tensor | None:
        """Hidden states [T, D] of the text encoders that wait in main memory; None if they are not cached."""
        key = text_key(prompt)
        return self.waiting.get(key)["states"] if self.waiting is not None and key in self.waiting else None


def text_key(prompt: str) -> str:
    """Cache key of the text embeddings of ``prompt``."""
    return f"text|{prompt}"


MEMORY_CACHE_BYTES = 128 * 2**20
"""Maximum size in bytes of the tensors that each process holds in memory."""


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())


@cached(LRUCache(MEMORY_CACHE_BYTES, getsizeof=_bytes), lock=Lock())
def _read(path: Path) -> dict[str, Tensor]:
    """Read a cache file; the last used tensors stay in memory, at most :data:`MEMORY_CACHE_BYTES` per process.

    A small data set is read repeatedly, and in a sweep on a shared backbone by every run.
    """
    return load_file(path)


def keys_of_rank(keys: Iterable[str], rank: int, processes: int) -> list[str]:
    """Keys that process ``rank`` of ``processes`` fills."""
    return list(keys)[rank::processes]
