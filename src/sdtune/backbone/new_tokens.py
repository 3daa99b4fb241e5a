"""New tokens for a text encoder: trainable embeddings beside the frozen embedding table.

Gal et al. 2022, "An image is worth one word: personalizing text-to-image generation using textual inversion".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from pydantic import ConfigDict, StringConstraints
from torch import Tensor, nn
from transformers import AddedToken, CLIPTokenizer

from sdtune.errors import UserError
from sdtune.formats import embeddings, read_safetensors
from sdtune.formats.embeddings import intermediate, word


@dataclass(frozen=True)
class NewToken:
    """A word to be learned.

    Args:
        token: as prompts write it, such as ``<my_cat>``; lower case, since CLIP's tokenizer lowers prompts, and an
            upper-case token of several vectors would silently use its first alone.
        init: a word or a description; the vectors begin at the mean of its tokens' embeddings.
        vectors: how many the token stands for.
        weights: an embedding's file to begin from instead, in any program's form, of as many vectors.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    token: str
    init: Annotated[str, StringConstraints(min_length=1)] | None = None
    vectors: Annotated[int, Ge(1)] = 1
    weights: str | None = None


class ExtendedEmbedding(nn.Module):
    """A frozen table of embeddings with further rows, a parameter of their own.

    Args:
        table: the vocabulary's.
        vectors: [N, D], the rows of the ids from ``first`` on.
    """

    def __init__(self, table: nn.Embedding, vectors: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.vectors = nn.Parameter(vectors, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The vocabulary's table alone."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L, D] from ``ids`` [B, L]; every new row stands in the graph, also where no id names it."""
        known = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        new = F.embedding((ids - self.first).clamp(0, len(self.vectors) - 1), self.vectors).to(known.dtype)
        return torch.where((ids >= self.first).unsqueeze(-1), new, known)


class Words:
    """A backbone's tokenizers with the new words in them.

    Args:
        tokenizers: get the tokens added; they differ in nothing but what they pad with.
        widths: for each token of the prompts, how many vectors it stands for.
    """

    def __init__(self, tokenizers: Sequence[CLIPTokenizer], widths: dict[str, int]) -> None:
        self.widths = widths
        self.first = len(tokenizers[0])
        assert all(len(tokenizer) == self.first for tokenizer in tokenizers)
        known = tokenizers[0].get_vocab()
        names = [_numbered(token, i) for token, width in widths.items() for i in range(width)]
        if taken := next((name for name in names if name in known), None):
            raise UserError(
                f"{taken!r} is a word of the tokenizer's already", key="new_tokens", remedy="choose another"
            )
        # As whole words, or a token "cat" would be found in "catalog".
        for tokenizer in tokenizers:
            tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=True) for name in names])

    def rows(self, token: str) -> range:
        """Which of the new vectors are ``token``'s."""
        before = sum(width for name, width in list(self.widths.items())[: list(self.widths).index(token)])
        return range(before, before + self.widths[token])

    def expanded(self, prompt: str) -> str:
        """``prompt`` with each token of several vectors written out, as diffusers does: ``<a> <a>_1 <a>_2``."""
        for token, width in self.widths.items():
            if width > 1:
                whole = " ".join(_numbered(token, i) for i in range(width)).replace("\\", r"\\")
                prompt = _alone(token).sub(whole, prompt)
        return prompt


def _alone(token: str) -> re.Pattern[str]:
    """``token`` as a word of its own, in any case."""
    return re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)


def _numbered(token: str, index: int) -> str:
    return token if index == 0 else f"{token}_{index}"


def initial(tokenizers: Sequence[CLIPTokenizer], tables: Sequence[nn.Embedding], token: NewToken) -> tuple[Tensor, ...]:
    """Where the vectors of ``token`` begin, [vectors, D] of each text encoder."""
    if token.weights is None:
        return tuple(_mean(words, table, token) for words, table in zip(tokenizers, tables, strict=True))
    file = Path(token.weights).expanduser()
    tensors, metadata = read_safetensors(file)
    found = list(embeddings.parse(file, tensors, metadata).values())
    theirs = [tuple(rows.shape) for rows in found[0]] if found else []
    wanted = [(token.vectors, table.weight.shape[1]) for table in tables]
    if theirs != wanted:
        shown = " and ".join(f"{n} x {d}" for n, d in theirs) or "no embedding"
        raise UserError(
            f"weights of {token.token!r}: {file} holds {shown}, and this token has"
            f" {' and '.join(f'{n} x {d}' for n, d in wanted)}",
            key="new_tokens",
            remedy=f"give vectors: {theirs[0][0] if theirs else 1}, or another file",
        )
    return tuple(rows.clone() for rows in found[0])


def _mean(tokenizer: CLIPTokenizer, table: nn.Embedding, token: NewToken) -> Tensor:
    """[vectors, D]: the mean of the embeddings of ``token.init``'s tokens, for each vector."""
    ids = torch.tensor(tokenizer(token.init, add_special_tokens=False).input_ids, device=table.weight.device)
    if not len(ids):
        raise UserError(f"init {token.init!r} of {token.token!r} has no tokens", key="new_tokens", remedy="give a word")
    mean: Tensor = table(ids).detach().mean(0)
    return mean.expand(token.vectors, -1).clone()


def check_tokens(tokens: Sequence[NewToken]) -> None:
    """UserError for tokens that a prompt could not name."""
    for token in tokens:
        if (token.init is None) == (token.weights is None):
            raise UserError(
                f"{token.token!r} needs a word to begin at: give init: cat, or weights: FILE", key="new_tokens"
            )
        if token.weights is not None and not Path(token.weights).expanduser().is_file():
            raise UserError(f"weights of {token.token!r}: {token.weights} does not exist", key="new_tokens")
        plain = re.sub(r"\s+", "_", token.token.strip().lower())
        if token.token != plain or not plain:
            raise UserError(
                f"{token.token!r} is not one word in lower case, to which CLIP's tokenizer turns prompts",
                key="new_tokens",
                remedy=f"write {plain or '<my_cat>'!r}",
            )
    names = [_numbered(t.token, i) for t in tokens for i in range(t.vectors)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{twice!r} stands twice", key="new_tokens", remedy="give each token once (<a>'s second vector is <a>_1)"
        )
    files = [word(token.token) for token in tokens]
    for token, file in zip(tokens, files, strict=True):
        if files.count(file) > 1 or intermediate(file):
            raise UserError(
                f"{token.token!r} would be kept as {file}.safetensors, which is another's name or an"
                " intermediate file's",
                key="new_tokens",
                remedy="choose another word",
            )


def check_mentioned(tokens: Sequence[NewToken], prompts: Sequence[str]) -> None:
    """UserError for a token that none of ``prompts`` holds: it would learn nothing."""
    for token in tokens:
        own = _alone(token.token)
        if not any(own.search(prompt) for prompt in prompts):
            raise UserError(
                f"{token.token} stands in no caption, such as {prompts[0]!r}",
                key="new_tokens",
                remedy=f'write it into the captions, or give data.prompt="{token.token}", with'
                " data.templates around it or not",
            )
