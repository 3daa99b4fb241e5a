"""``Pretrained``: a pretrained Stable Diffusion that can be loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sdtune.backbone.source import PipelineSource

if TYPE_CHECKING:
    from torch import dtype

    from sdtune.backbone.backbone import Backbone


class Pretrained(PipelineSource):
    """A Stable Diffusion on disk or on the hub, with :meth:`load`; arguments as of :class:`PipelineSource`."""

    _loader: Callable[[], Backbone] | None = None

    def loaded_by(self, loader: Callable[[], Backbone]) -> Pretrained:
        """A copy of this source whose :meth:`load` returns what ``loader`` returns, whatever its arguments."""
        own = copy.copy(self)
        own._loader = loader
        return own

    def trained(self, folder: Path) -> Pretrained:
        """The pipeline ``folder`` that was trained from this, with what its files do not say."""
        said = ("guidance", "clip", "clip_skip", "max_tokens", "prediction_type", "zero_terminal_snr", "allow_pickle")
        return Pretrained(str(folder), config=self.config_folder, **{key: getattr(self, key) for key in said})

    def load(self, seed: int = 0, unet: dtype | None = None) -> Backbone:
        """The backbone in float32, its UNet in the type ``unet`` if given; on the CPU, in eval mode, frozen."""
        from sdtune.backbone.loading import load_backbone

        return load_backbone(self, seed, unet) if self._loader is None else self._loader()
