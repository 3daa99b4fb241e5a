"""``Pretrained``: a pretrained Stable Diffusion model from disk or from the Hugging Face hub."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sdtune.backbone.source import PipelineSource

if TYPE_CHECKING:
    from torch import dtype

    from sdtune.backbone.backbone import Backbone


INHERITED = (
    "guidance",
    "clip",
    "clip_skip",
    "max_tokens",
    "prediction_type",
    "flow_shift",
    "zero_terminal_snr",
    "t5",
    "t5_tokens",
    "allow_pickle",
)
"""Settings that a trained pipeline does not store."""


class Pretrained(PipelineSource):
    """A pretrained Stable Diffusion model with :meth:`load`; arguments as in :class:`PipelineSource`."""

    _loader: Callable[[], Backbone] | None = None

    def with_loader(self, loader: Callable[[], Backbone]) -> Pretrained:
        """Copy of this source whose :meth:`load` ignores its arguments and returns the result of ``loader``."""
        source = copy.copy(self)
        source._loader = loader
        return source

    def of_trained_pipeline(self, folder: Path) -> Pretrained:
        """Source of ``folder``, a pipeline trained from this backbone; settings it does not store are inherited."""
        inherited = {name: getattr(self, name) for name in INHERITED}
        return Pretrained(str(folder), config=self.config_folder, **inherited)

    def load(self, seed: int = 0, denoiser_dtype: dtype | None = None) -> Backbone:
        """Load the backbone on the CPU: frozen, in eval mode, in float32, or the denoiser in ``denoiser_dtype``."""
        from sdtune.backbone.loading import load_backbone

        return load_backbone(self, seed, denoiser_dtype) if self._loader is None else self._loader()
