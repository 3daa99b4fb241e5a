"""Textual Inversion: only the embedding vectors of new tokens are trained (Gal et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Unpack

from sdtune.data.datamodule import ImageDataModule
from sdtune.errors import UserError
from sdtune.methods.base import Adapter
from sdtune.training.arguments import Common

TextEncoder = Literal["text_encoder", "text_encoder_2", "text_encoder_3"]


class TextualInversion(Adapter):
    """Textual Inversion of ``new_tokens`` (Gal et al. 2022, section 3.2, eq. 2).

    Args:
        encoders: text encoders that learn the new tokens, each with vectors of its own; the others read a token as
            plain text. If None, the CLIP text encoders. T5, if chosen, runs in each step.
    """

    artifact_kind = "embeddings"
    denoiser_is_read_only = True

    trains_only_new_tokens: ClassVar[bool] = True

    def __init__(self, *, encoders: Sequence[TextEncoder] | None = None, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        if encoders is not None and not encoders:
            raise UserError("the list is empty", key="method.encoders", remedy="set it to null, or [text_encoder]")
        self.token_encoders = None if encoders is None else tuple(encoders)

    def check_data(self, data: ImageDataModule) -> None:
        known = self.source.text_encoders
        unknown = [name for name in self.token_encoders or () if name not in known]
        if unknown:
            raise UserError(
                f"this model has no {unknown[0]}", key="method.encoders", remedy=f"set some of {', '.join(known)}"
            )

    def inject(self) -> None:
        """Do nothing: the base class makes the new tokens trainable."""

    def artifact_bytes(self) -> int:
        """Size in bytes of the embedding vectors in both export formats."""
        return 2 * super().artifact_bytes()

    def write_artifact(self, folder: Path, name: str) -> None:
        """Do nothing: the base class writes the new tokens."""
