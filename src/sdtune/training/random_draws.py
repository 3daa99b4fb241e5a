"""Random timesteps, noise and dropout of a step, keyed by (seed, stream, step, position)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdtune import streams
from sdtune.data.datamodule import VALIDATION_TIMESTEPS
from sdtune.randomness import generator


def noise(
    shape: Sequence[int], seed: int, stream: str, step: int, positions: Iterable[int], device: torch.device
) -> Tensor:
    """Standard normal [len(positions), *shape], float32."""
    # Validation looks at the same noise in every run, so that curves compare across seeds too.
    own = seed if stream.startswith(f"{streams.TRAIN}/") else 0
    rows = [generator(own, stream, step, p).standard_normal(shape, dtype=np.float32) for p in positions]
    drawn = torch.from_numpy(np.stack(rows))
    # Only a copy from pinned memory does not wait.
    drawn = drawn.pin_memory() if device.type == "cuda" else drawn
    return drawn.to(device, non_blocking=True)


def timesteps(count: int, seed: int, stream: str, step: int, positions: Sequence[int], device: torch.device) -> Tensor:
    """int64 [len(positions)] in [0, count): at random in training, a fixed ladder in validation."""
    if stream == streams.VALIDATION:
        drawn = [int((p % VALIDATION_TIMESTEPS + 0.5) * count / VALIDATION_TIMESTEPS) for p in positions]
    else:
        drawn = [int(generator(seed, f"{stream}/{streams.TIMESTEP}", step, p).integers(count)) for p in positions]
    return torch.tensor(drawn).to(device, non_blocking=True)


def seed_dropout(seed: int, rank: int, step: int, batch_idx: int, device: torch.device) -> None:
    """Seed the global generators, which dropout inside a model uses, by place: a resumed run is exact."""
    number = int(generator(seed, f"{streams.DROPOUT}/{rank}", step, batch_idx).integers(2**31))
    # torch.manual_seed takes milliseconds: it looks up its caller's whole stack for devices that there are not.
    torch.default_generator.manual_seed(number)
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).manual_seed(number)
