"""New tokens of a backbone: initialize them, read their embedding vectors, and temporarily remove them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.new_tokens import ExtendedEmbedding, NewToken, initial_vectors


def initialize_tokens(backbone: Backbone, tokens: Sequence[NewToken], encoders: Collection[str] | None = None) -> None:
    """Add ``tokens`` to ``backbone`` with their initial embedding vectors.

    Args:
        encoders: text encoders that learn the tokens; None: those that a method may train.
    """
    chosen = backbone.trainable_encoders if encoders is None else encoders
    tables = [encoder.get_input_embeddings() for encoder in backbone.encoders.values()]
    learns = [name in chosen for name in backbone.encoders]
    backbone.add_tokens({token.token: initial_vectors(backbone.tokenizers, tables, token, learns) for token in tokens})


def token_vectors(backbone: Backbone) -> dict[str, tuple[Tensor, ...]]:
    """Current embedding vectors [N, D] of each new token, one tensor per text encoder; [0, D] where it has none."""
    tokens = dict.fromkeys(token for known in backbone.new_tokens.values() for token in known.vector_counts)
    return {token: tuple(_rows(backbone, name, token) for name in backbone.encoders) for token in tokens}


def _rows(backbone: Backbone, encoder: str, token: str) -> Tensor:
    table, known = backbone.encoders[encoder].get_input_embeddings(), backbone.new_tokens.get(encoder)
    rows: Tensor = table.weight.new_empty(0, table.weight.shape[1])
    if known is not None and token in known.vector_counts:
        rows = table.vectors[list(known.rows(token))]
    return rows


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
    backbone.new_tokens = {}


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
