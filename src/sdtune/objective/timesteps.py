"""Distribution of the timesteps of training samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt

TimestepKind = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Timesteps:
    """Distribution of the timesteps of training samples.

    Args:
        kind: ``uniform``, or ``logit_normal`` with location 0 and scale 1 (Esser et al. 2024, section 3.1); None:
            uniform for diffusion models, logit-normal for flow models.
        shift: shift s of the noise levels, t = s u / (1 + (s - 1) u): more than 1 draws more noise (Esser et al. 2024,
            eq. 23); None: that of the model, 1 for diffusion models.
    """

    kind: TimestepKind | None = None
    shift: Annotated[float, Gt(0)] | None = None

    def draw(self, rng: np.random.Generator, *, default_kind: TimestepKind, default_shift: float) -> float:
        """Random time in (0, 1]. A setting that is None has the default, which the model gives."""
        if (self.kind or default_kind) == "uniform":
            u = 1.0 - float(rng.random())  # in (0, 1]: without noise there is nothing to predict
        else:
            u = 1.0 / (1.0 + math.exp(-float(rng.standard_normal())))
        s = self.shift or default_shift
        return s * u / (1 + (s - 1) * u)
