"""Load embeddings of new tokens onto a backbone for sampling, and remove them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.new_token_vectors import tokens_added
from sdtune.backbone.new_tokens import check_vector_counts
from sdtune.errors import UserError
from sdtune.formats.embeddings import TokenVectors, of_encoders
from sdtune.loaders.artifact import LoadedArtifact


@dataclass(frozen=True)
class LoadedWords(LoadedArtifact):
    """Embedding vectors of new tokens; they have no strength."""

    vectors: TokenVectors

    @contextmanager
    def applied(self, backbone: Backbone, factor: float = 1.0, *, only_to_draw: bool = False) -> Iterator[None]:
        """Context manager that adds the tokens to ``backbone``."""
        count = len(backbone.encoders)
        with tokens_added(backbone, {token: of_encoders(rows, count) for token, rows in self.vectors.items()}):
            yield


def check_words(path: Path, vectors: TokenVectors, backbone: Backbone) -> None:
    """Raise UserError if the embedding vectors in ``path`` do not fit ``backbone``."""
    widths = [encoder.config.hidden_size for encoder in backbone.encoders.values()]
    for token, rows in vectors.items():
        pairs = list(zip(rows, widths, strict=False))
        # Only T5 may be absent in a file, or in the backbone.
        used = max(number for number, r in enumerate(rows, 1) if len(r))
        is_complete = len(backbone.trainable_encoders) <= len(rows) and used <= len(widths)
        if not is_complete or any(len(r) and r.shape[1] != width for r, width in pairs):
            vector_widths = [encoder_rows.shape[1] for encoder_rows in rows]
            raise UserError(
                f"{path}: embedding size is {_and(vector_widths)}, but this backbone has {_and(widths)}",
                remedy="use the backbone that the file was trained with",
            )
        for encoder, r in zip(backbone.encoders, rows, strict=False):
            check_vector_counts({token: len(r)}, backbone.facts, encoder, f"adapters ({path})")


def check_distinct(artifacts: Sequence[LoadedArtifact]) -> None:
    """Raise UserError if two artifacts contain the same token."""
    found: set[str] = set()
    for artifact in artifacts:
        for token in artifact.vectors if isinstance(artifact, LoadedWords) else ():
            if token in found:
                raise UserError(
                    f"{artifact.path}: token {token!r} is already in another adapter", remedy="remove one of the two"
                )
            found.add(token)


def _and(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
