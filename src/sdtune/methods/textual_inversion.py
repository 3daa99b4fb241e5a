"""Textual Inversion: only the embeddings of new words are trained (Gal et al. 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from sdtune.methods.base import Adapter


class TextualInversion(Adapter):
    """Only the vectors of ``new_tokens`` are trained (Gal et al. 2022, section 3.2, eq. 2)."""

    artifact_kind = "words"
    reads_denoiser_only = True

    needs_tokens: ClassVar[bool] = True

    def inject(self) -> None:
        """The new tokens are all that is open."""

    def artifact_bytes(self) -> int:
        """Of both forms."""
        return 2 * super().artifact_bytes()

    def write_artifact(self, folder: Path, name: str) -> None:
        """The new tokens' files are all that there is."""
