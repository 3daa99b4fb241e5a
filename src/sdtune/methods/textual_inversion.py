"""Textual Inversion: the vectors of a new word are learned, and nothing else of the model moves."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from sdtune.methods.base import Adapter
from sdtune.methods.given import Common


class TextualInversion(Adapter):
    """Only the vectors of ``new_tokens`` are trained (Gal et al. 2022, section 3.2, eq. 2)."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        if not self.new_tokens:
            raise ValueError(
                'new_tokens is empty: method=textual_inversion learns words; give \'new_tokens=[{token: "<my_cat>",'
                " init: cat}]'"
            )

    def inject(self) -> None:
        """The new tokens are all that is open."""

    def write_artifact(self, folder: Path, name: str) -> None:
        """The new tokens' files are all that there is."""
