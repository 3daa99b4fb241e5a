"""Deterministic random numbers, keyed by (seed, stream, step, position).

A counter-based generator (Philox4x64-10; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") has no
state to save or restore: the numbers of a sample depend only on its key. So a resumed run, a run with another number of
processes and another run of a sweep get the same noise.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def _key(seed: int, stream: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:16], "little")


def generator(seed: int, stream: str, step: int = 0, position: int = 0) -> np.random.Generator:
    """Random generator of one sample.

    Args:
        seed: the run's seed.
        stream: name of the random variable ("noise", "timestep", ...); streams are independent.
        step: optimizer step (or epoch), >= 0.
        position: index in the global batch of that step, >= 0.

    ``step`` and ``position`` are the two high words of the counter, and the low words count the draws of one sample. So
    the sequences of different samples and steps never overlap.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, stream), counter=[0, 0, step, position]))
