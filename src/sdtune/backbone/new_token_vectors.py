"""New tokens of a backbone: initialize them, read their embedding vectors, and temporarily remove them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.new_tokens import ExtendedEmbedding, NewToken, initial_vectors


def initialize_tokens(backbone: Backbone, tokens: Sequence[NewToken]) -> None:
    """Add ``tokens`` to ``backbone`` with their initial embedding vectors."""
    tables = [encoder.get_input_embeddings() for encoder in backbone.encoders.values()]
    backbone.add_tokens({token.token: initial_vectors(backbone.tokenizers, tables, token) for token in tokens})


def token_vectors(backbone: Backbone) -> dict[str, tuple[Tensor, ...]]:
    """Current embedding vectors [N, D] of each new token, one tensor per text encoder."""
    if backbone.new_tokens is None:
        return {}
    new_tokens = backbone.new_tokens
    return {
        token: tuple(rows[list(new_tokens.rows(token))] for rows in backbone.new_token_vectors)
        for token in new_tokens.vector_counts
    }


@contextmanager
def tokens_added(backbone: Backbone, vectors: Mapping[str, Sequence[Tensor]]) -> Iterator[None]:
    """Context manager that adds new tokens with their ``vectors``, besides those that ``backbone`` already has."""
    tables = {name: encoder.get_input_embeddings() for name, encoder in backbone.encoders.items()}
    new_tokens = backbone.new_tokens
    backbone.add_tokens(vectors)
    try:
        yield
    finally:
        backbone.new_tokens = new_tokens
        for name, table in tables.items():
            backbone.encoders[name].set_input_embeddings(table)


def remove_tokens(backbone: Backbone) -> None:
    """Remove all new tokens, so that others can be added."""
    _set_original_tables(backbone)
    backbone.new_tokens = None


def _set_original_tables(backbone: Backbone) -> None:
    for encoder in backbone.encoders.values():
        table = encoder.get_input_embeddings()
        if isinstance(table, ExtendedEmbedding):
            encoder.set_input_embeddings(table.table)


@contextmanager
def without_new_tokens(backbone: Backbone) -> Iterator[None]:
    """Context manager that gives the text encoders their original embedding tables, without the new tokens."""
    tables = {name: encoder.get_input_embeddings() for name, encoder in backbone.encoders.items()}
    _set_original_tables(backbone)
    try:
        yield
    finally:
        for name, table in tables.items():
            backbone.encoders[name].set_input_embeddings(table)
