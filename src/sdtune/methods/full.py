"""Full fine-tuning: the whole UNet is trained. The most expensive way, and the one that remakes the model."""

from __future__ import annotations

import json
from pathlib import Path

from sdtune.formats.pipeline import copy_pipeline, save_component
from sdtune.methods.base import Adapter


class Full(Adapter):
    """Every weight of the UNet is open (Rombach et al. 2022, section 3.3: the same loss as in pretraining)."""

    def inject(self) -> None:
        self.backbone.unet.requires_grad_(True)
        self.backbone.unet.train()

    def artifact_bytes(self) -> int:
        """The whole pipeline's, with its frozen parts as float32 files."""
        return sum(4 * p.numel() for p in self.backbone.parameters())

    def artifact(self, folder: Path, name: str) -> None:
        """A pipeline folder in the diffusers layout, ``<folder>/<name>``; what was frozen is copied from its source."""
        target = folder / name
        copy_pipeline(self.source.folder(), target, without=("unet",))
        save_component(self.backbone.unet, target / "unet")
        (target / "sdtune.json").write_text(json.dumps({"backbone": self.source.hash()}) + "\n")
