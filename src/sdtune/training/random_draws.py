"""Deterministic noise, timesteps and dropout seeds, keyed by (seed, stream, step, position)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdtune import streams
from sdtune.data.datamodule import VALIDATION_TIMESTEPS
from sdtune.hardware.devices import send
from sdtune.randomness import generator


def noise(
    shape: Sequence[int], seed: int, stream: str, step: int, positions: Iterable[int], device: torch.device
) -> Tensor:
    """Standard normal noise, float32 [len(positions), *shape]."""
    # Same validation noise for every seed, so that curves are comparable across seeds.
    stream_seed = seed if stream.startswith(f"{streams.TRAIN}/") else 0
    rows = [generator(stream_seed, stream, step, p).standard_normal(shape, dtype=np.float32) for p in positions]
    return send(torch.from_numpy(np.stack(rows)), device)


def timesteps(count: int, seed: int, stream: str, step: int, positions: Sequence[int], device: torch.device) -> Tensor:
    """Timesteps, int64 [len(positions)] in [0, count): uniformly random, or evenly spaced for validation."""
    if stream == streams.VALIDATION:
        drawn = [int((p % VALIDATION_TIMESTEPS + 0.5) * count / VALIDATION_TIMESTEPS) for p in positions]
    else:
        drawn = [int(generator(seed, f"{stream}/{streams.TIMESTEP}", step, p).integers(count)) for p in positions]
    return send(torch.tensor(drawn), device)


def seed_dropout(seed: int, rank: int, step: int, batch_idx: int, device: torch.device) -> None:
    """Seed torch's global generators, which dropout layers use, so that a resumed run is bit-identical."""
    dropout_seed = int(generator(seed, f"{streams.DROPOUT}/{rank}", step, batch_idx).integers(2**31))
    # torch.manual_seed costs milliseconds per call (it inspects the call stack); set the generators directly.
    torch.default_generator.manual_seed(dropout_seed)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(dropout_seed)
