"""Textual Inversion: only the embedding vectors of new tokens are trained (Gal et al. 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from sdtune.methods.base import Adapter


class TextualInversion(Adapter):
    """Textual Inversion of ``new_tokens`` (Gal et al. 2022, section 3.2, eq. 2)."""

    artifact_kind = "embeddings"
    denoiser_is_read_only = True

    trains_only_new_tokens: ClassVar[bool] = True

    def inject(self) -> None:
        """Do nothing: the base class makes the new tokens trainable."""

    def artifact_bytes(self) -> int:
        """Size in bytes of the embedding vectors in both export formats."""
        return 2 * super().artifact_bytes()

    def write_artifact(self, folder: Path, name: str) -> None:
        """Do nothing: the base class writes the new tokens."""
