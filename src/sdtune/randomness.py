"""Deterministic random numbers, keyed by (seed, stream, step, position).

A counter-based generator (Philox4x64-10; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") has no
state to save or restore: the draw for one sample is found from its place alone. So a resumed run, another number of
processes and a second run of a sweep see the same noise.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def _key(seed: int, stream: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:16], "little")


def generator(seed: int, stream: str, step: int = 0, position: int = 0) -> np.random.Generator:
    """The generator of one sample.

    Args:
        seed: the run's seed.
        stream: what is drawn ("noise", "timestep", ...); streams are independent of each other.
        step: optimizer step (or epoch), >= 0.
        position: place in the global batch of that step, >= 0.

    ``step`` and ``position`` fill the counter's two high words: the low words count the draws of one sample, so
    neighbouring steps can never overlap.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, stream), counter=[0, 0, step, position]))
