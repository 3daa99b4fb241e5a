"""Deterministic noise, timesteps and dropout seeds, keyed by (seed, stream, step, position)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdtune import streams
from sdtune.data.datamodule import VALIDATION_TIMESTEPS
from sdtune.hardware.devices import send
from sdtune.objective import ProbabilityPath, Timesteps
from sdtune.randomness import generator


def noise(
    shape: Sequence[int], seed: int, stream: str, step: int, positions: Iterable[int], device: torch.device
) -> Tensor:
    """Standard normal noise, float32 [len(positions), *shape]."""
    # Same validation noise for every seed, so that curves are comparable across seeds.
    stream_seed = seed if stream.startswith(f"{streams.TRAIN}/") else 0
    rows = [generator(stream_seed, stream, step, p).standard_normal(shape, dtype=np.float32) for p in positions]
    return send(torch.from_numpy(np.stack(rows)), device)


def times(
    path: ProbabilityPath,
    settings: Timesteps,
    seed: int,
    stream: str,
    step: int,
    positions: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Times on ``path`` [len(positions)]: random, or for validation at (k + 0.5) / 8 of the times."""
    if stream == streams.VALIDATION:
        drawn = [path.at((p % VALIDATION_TIMESTEPS + 0.5) / VALIDATION_TIMESTEPS) for p in positions]
    else:
        drawn = [path.draw(generator(seed, f"{stream}/{streams.TIMESTEP}", step, p), settings) for p in positions]
    tensor = path.tensor(drawn)
    if device.type == "mps" and tensor.dtype == torch.float64:  # which Apple's GPUs lack
        tensor = tensor.float()
    return send(tensor, device)


def seed_dropout(seed: int, rank: int, step: int, batch_idx: int, device: torch.device) -> None:
    """Seed torch's global generators, which dropout layers use, so that a resumed run is bit-identical."""
    dropout_seed = int(generator(seed, f"{streams.DROPOUT}/{rank}", step, batch_idx).integers(2**31))
    # torch.manual_seed costs milliseconds per call (it inspects the call stack); set the generators directly.
    torch.default_generator.manual_seed(dropout_seed)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(dropout_seed)
