"""New tokens for a text encoder: trainable embedding vectors next to the frozen embedding table.

Gal et al. 2022, "An image is worth one word: personalizing text-to-image generation using textual inversion".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from pydantic import ConfigDict, StringConstraints
from torch import Tensor, nn

from sdtune.backbone.families.base import Facts
from sdtune.errors import UserError
from sdtune.files import is_snapshot
from sdtune.formats import embeddings, read_safetensors
from sdtune.formats.embeddings import file_stem


@dataclass(frozen=True)
class NewToken:
    """A new token: a word in prompts that stands for trained embedding vectors.

    Args:
        token: the token in prompts, such as ``<my_cat>``, in lower case, as in CLIP's vocabulary; prompts may write it
            in upper case.
        init: a word or a description; each vector starts as the mean embedding of the tokens of this text.
        vectors: number of embedding vectors of the token.
        weights: embedding file to initialize from instead of ``init``, in diffusers or A1111 format, with the same
            number of vectors.
        overwrite: allow a ``token`` that is already in the vocabulary; in prompts the new token replaces the old word.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    token: str
    init: Annotated[str, StringConstraints(min_length=1)] | None = None
    vectors: Annotated[int, Ge(1)] = 1
    weights: str | None = None
    overwrite: bool = False


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table with additional rows in a separate parameter.

    Args:
        table: embeddings of the original vocabulary.
        vectors: [N, D], the embeddings of the new ids, which follow those of ``table``.
    """

    def __init__(self, table: nn.Embedding, vectors: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(vectors, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Weight of the original table, without the new rows."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [B, L, D] of ``ids`` [B, L]; all new rows are in the autograd graph, even unused ones."""
        first_id = self.table.num_embeddings
        known = self.table(ids.clamp(max=first_id - 1))
        new = F.embedding((ids - first_id).clamp(0, len(self.vectors) - 1), self.vectors).to(known.dtype)
        return torch.where((ids >= first_id).unsqueeze(-1), new, known)


class NewTokens:
    """The new tokens of a text encoder: where they occur in prompts, and their ids.

    The tokenizers stay unchanged: an added token would be matched by the tokenizer's own rules, ``sks`` inside
    ``sks-style`` for example, and only some of the vectors of a token might match.

    Args:
        first_id: id of the first vector: the number of embeddings of the text encoder.
        vector_counts: number of vectors of each new token.
    """

    def __init__(self, first_id: int, vector_counts: dict[str, int]) -> None:
        self.first_id, self.vector_counts = first_id, vector_counts

    def rows(self, token: str) -> range:
        """Rows of ``token`` among all new embedding vectors."""
        start = sum(count for name, count in list(self.vector_counts.items())[: list(self.vector_counts).index(token)])
        return range(start, start + self.vector_counts[token])

    def ids(self, tokenizer: Any, prompt: str) -> list[int]:
        """Token ids of ``prompt`` without start and end token; each new token becomes the ids of all its vectors."""
        ids: list[int] = []
        for text, token in split_at_tokens(list(self.vector_counts), prompt):
            ids += tokenizer(text, add_special_tokens=False).input_ids if text else []
            ids += [self.first_id + row for row in self.rows(token)] if token is not None else []
        return ids


def split_at_tokens(tokens: Collection[str], prompt: str) -> list[tuple[str, str | None]]:
    """Split ``prompt`` into pairs of a text and the new token that follows it (None at the end of the prompt).

    Case is ignored. A letter, a digit, ``_`` or a hyphen next to a token makes it a part of another
    word: ``sks`` does not occur in ``sks-style``. The longest token that fits is taken.
    """
    by_length = sorted(tokens, key=len, reverse=True)
    alternatives = "|".join(f"({re.escape(unicodedata.normalize('NFC', token))})" for token in by_length)
    pattern, pairs, end = re.compile(rf"(?<![\w-])(?:{alternatives})(?![\w-])", re.IGNORECASE), [], 0
    prompt = unicodedata.normalize("NFC", prompt)  # as CLIP's tokenizer does
    for match in pattern.finditer(prompt) if by_length else ():
        assert match.lastindex is not None
        pairs.append((prompt[end : match.start()], by_length[match.lastindex - 1]))
        end = match.end()
    return [*pairs, (prompt[end:], None)]


def _vector_token(token: str, index: int) -> str:
    return token if index == 0 else f"{token}_{index}"


def initial_vectors(
    tokenizers: Sequence[Any], tables: Sequence[nn.Embedding], token: NewToken, learns: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Initial vectors of ``token``, [vectors, D] for each text encoder.

    Args:
        learns: for each text encoder, whether it learns the token; the others get no vectors, [0, D].

    Raises:
        UserError: ``token.init`` has no tokens, or the vectors in ``token.weights`` have other shapes.
    """
    counts = [token.vectors if is_chosen else 0 for is_chosen in learns]
    if token.weights is None:
        return tuple(
            _mean_embedding(tokenizer, table, token)[:count]
            for tokenizer, table, count in zip(tokenizers, tables, counts, strict=True)
        )
    file = Path(token.weights).expanduser()
    tensors, metadata = read_safetensors(file)
    parsed = next(iter(embeddings.parse(file, tensors, metadata).values()), ())
    found = embeddings.of_encoders(parsed, len(tables)) if parsed else ()
    file_shapes = [tuple(rows.shape) for rows in found if len(rows)]
    expected_shapes = [(count, table.weight.shape[1]) for count, table in zip(counts, tables, strict=True) if count]
    if file_shapes != expected_shapes:
        shown = " and ".join(f"{n} x {d}" for n, d in file_shapes) or "no embedding"
        raise UserError(
            f"weights of {token.token!r}: {file} contains {shown}, this token needs"
            f" {' and '.join(f'{n} x {d}' for n, d in expected_shapes)}",
            key="new_tokens",
            remedy=f"set vectors: {file_shapes[0][0] if file_shapes else 1}, or use another file",
        )
    return tuple(rows.clone() for rows in found)


def _mean_embedding(tokenizer: Any, table: nn.Embedding, token: NewToken) -> Tensor:
    """Mean embedding of the tokens of ``token.init``, repeated for each vector: [vectors, D]."""
    ids = torch.tensor(tokenizer(token.init, add_special_tokens=False).input_ids, device=table.weight.device)
    if not len(ids):
        raise UserError(f"init {token.init!r} of {token.token!r} has no tokens", key="new_tokens", remedy="use a word")
    mean: Tensor = table(ids).detach().mean(0)
    return mean.expand(token.vectors, -1).clone()


def check_tokens(tokens: Sequence[NewToken]) -> None:
    """Raise UserError for new tokens with invalid settings."""
    for token in tokens:
        if (token.init is None) == (token.weights is None):
            raise UserError(
                f"{token.token!r} needs exactly one of init and weights",
                key="new_tokens",
                remedy="set init: cat or weights: FILE",
            )
        if token.weights is not None and not Path(token.weights).expanduser().is_file():
            raise UserError(
                f"weights of {token.token!r}: {token.weights} does not exist",
                key="new_tokens",
                remedy="name an embedding file",
            )
        normalized = re.sub(r"\s+", "_", unicodedata.normalize("NFC", token.token).strip().lower())
        if token.token != normalized or not normalized:
            raise UserError(
                f"{token.token!r} is not a single lower-case word",
                key="new_tokens",
                remedy=f"use {normalized or '<my_cat>'!r}",
            )
    vector_tokens = [_vector_token(t.token, i) for t in tokens for i in range(t.vectors)]
    duplicate = next((name for name in vector_tokens if vector_tokens.count(name) > 1), None)
    if duplicate is not None:
        raise UserError(
            f"{duplicate!r} is defined twice",
            key="new_tokens",
            remedy="list each token once (the second vector of <a> is <a>_1)",
        )
    files = [file_stem(token.token) for token in tokens]
    for token, file in zip(tokens, files, strict=True):
        if files.count(file) > 1 or is_snapshot(file):
            raise UserError(
                f"{token.token!r} would be saved as {file}.safetensors, the file of another token or a snapshot",
                key="new_tokens",
                remedy="use another token",
            )


def check_vocabulary(tokens: Sequence[NewToken], tokenizer: Any) -> None:
    """Raise UserError for a token that the vocabulary has already, unless it has ``overwrite``.

    CLIP's vocabulary has two entries for a string: ``parrot</w>``, a complete word or the end of one, and ``parrot``,
    before more letters. T5's has ``\u2581parrot``, the start of a word, and distinguishes upper case.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        known = (token.token, f"{token.token}</w>", f"\u2581{token.token}")
        if not token.overwrite and any(entry in vocabulary for entry in known):
            raise UserError(
                f"{token.token!r} is already in the tokenizer's vocabulary; as a new token it would lose its meaning",
                key="new_tokens",
                remedy=f"use <{token.token}>, or add overwrite: true to replace it",
            )


def check_vector_counts(vector_counts: Mapping[str, int], facts: Facts, encoder: str, key: str) -> None:
    """Raise UserError for a new token with more vectors than fit into a prompt.

    Args:
        facts: properties of the backbone.
        encoder: text encoder that has the vectors.
        key: config key for the error.
    """
    room, setting = facts.room_of(encoder)
    for token, count in vector_counts.items():
        if count > room:
            raise UserError(
                f"{token!r} has {count} vectors, but a prompt of {encoder} has room for {room}",
                key=key,
                remedy=f"use fewer vectors, or a larger {setting}" if setting else "use fewer vectors",
            )


def check_mentioned(tokens: Sequence[NewToken], prompts: Iterable[str]) -> None:
    """Raise UserError for a token that occurs in none of ``prompts`` and would therefore not be trained."""
    missing = [token.token for token in tokens]
    first = ""
    for prompt in prompts:
        first = first or prompt
        mentioned = {name for _, name in split_at_tokens(missing, prompt)}
        missing = [name for name in missing if name not in mentioned]
        if not missing:
            return
    for name in missing:
        raise UserError(
            f"{name} occurs in no caption (first caption: {first!r})",
            key="new_tokens",
            remedy=f"add it to the captions; 'data.trigger=\"{name}\"' puts it before those of data=folder",
        )
