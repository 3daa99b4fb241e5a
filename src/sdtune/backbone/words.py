"""New words of a backbone: begin them, read their vectors, and take them out for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.new_tokens import ExtendedEmbedding, NewToken, initial


def begin_tokens(backbone: Backbone, tokens: Sequence[NewToken]) -> None:
    """Add ``tokens`` to ``backbone`` at their initial values."""
    tables = [encoder.get_input_embeddings() for encoder in backbone.encoders.values()]
    backbone.add_tokens({t.token: initial(backbone.tokenizers, tables, t) for t in tokens})


def word_vectors(backbone: Backbone) -> dict[str, tuple[Tensor, ...]]:
    """The vectors [N, D] of each new word, one of each text encoder, as they are now."""
    if backbone.words is None:
        return {}
    words = backbone.words
    return {token: tuple(rows[list(words.rows(token))] for rows in backbone.learned) for token in words.widths}


@contextmanager
def plain_vocabulary(backbone: Backbone) -> Iterator[None]:
    """Within it, the text encoders are as others know them: without the new words."""
    tables = {name: encoder.get_input_embeddings() for name, encoder in backbone.encoders.items()}
    for name, table in tables.items():
        if isinstance(table, ExtendedEmbedding):
            backbone.encoders[name].set_input_embeddings(table.table)
    try:
        yield
    finally:
        for name, table in tables.items():
            backbone.encoders[name].set_input_embeddings(table)
