"""Facts about the captions of a data set: how many, how long, what is cut; computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sdtune.backbone.backbone import Backbone
from sdtune.data import ImageDataModule
from sdtune.data.prompts import distinct
from sdtune.errors import UserError
from sdtune.files import mark_used, read_json, write_json
from sdtune.paths import cache_folder
from sdtune.progress import bar
from sdtune.sampling.prompts import count_tokens

COUNTED = 20_000
"""Images whose captions a training counts before its first step; ``sdtune prepare`` counts all."""

_AT_ONCE = 1024
_MOST_TAGS = 200


@dataclass(frozen=True)
class CaptionFacts:
    """Facts about the captions of a data set.

    Args:
        total: number of images.
        counted: number of images whose captions were counted: all, or evenly spaced ones.
        distinct: number of different prompts of the counted images.
        longest: the prompt with most tokens.
        longest_tokens: its number of tokens, with start and end token.
        limit: number of tokens that the text encoder reads.
        cut: number of different prompts that have more.
        tags: the most frequent texts between commas, with the number of training images that have them.
    """

    total: int
    counted: int
    distinct: int
    longest: str
    longest_tokens: int
    limit: int
    cut: int
    tags: dict[str, int]

    @property
    def is_complete(self) -> bool:
        """Whether all captions were counted."""
        return self.counted == self.total


def caption_facts(
    data: ImageDataModule, backbone: Backbone, tokenizer: Path, *, complete: bool = False
) -> CaptionFacts:
    """Facts about the captions of ``data``, from the cache if they were counted before.

    Args:
        tokenizer: folder of the tokenizer.
        complete: count the captions of all images; otherwise at most those of :data:`COUNTED` images.
    """
    total = sum(len(source.train) + len(source.held_out) for source in data.parts.values())
    file = cache_folder() / "tables" / f"captions-{_key(data, backbone, tokenizer)}.json"
    if (known := _read(file)) is not None and (known.is_complete or not complete):
        mark_used(file)
        return known
    counts_all = complete or total <= COUNTED
    captions = (source.train.captions() for source in data.parts.values())
    used = itertools.chain.from_iterable(captions) if counts_all else _sampled(data)
    tags = Counter(tag for caption in used for tag in {part.strip() for part in caption.split(",")} if tag)
    prompts = data.all_prompts() if counts_all else distinct(_sampled(data))
    facts = _counted(prompts, tags, backbone, total, total if counts_all else COUNTED)
    write_json(file, asdict(facts))
    return facts


def _read(file: Path) -> CaptionFacts | None:
    try:
        return CaptionFacts(**read_json(file))
    except (UserError, TypeError):  # none yet, or of another version
        return None


def _key(data: ImageDataModule, backbone: Backbone, tokenizer: Path) -> str:
    digest = hashlib.sha256(data.fingerprint.encode())
    for source in data.parts.values():
        values = (source.prompt_templates, str(source.train.rules), source.caption_dropout, source.class_prompts)
        digest.update(repr(values).encode())
    for file in sorted(file for file in tokenizer.iterdir() if file.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    counts = {name: tokens.vector_counts for name, tokens in backbone.new_tokens.items()} or None
    digest.update(repr((counts, backbone.prompt_limit)).encode())
    return digest.hexdigest()[:32]


def _sampled(data: ImageDataModule) -> Iterator[str]:
    """Prompts of evenly spaced training images, each in the first template."""
    total = sum(len(source.train) for source in data.parts.values())
    for source in data.parts.values():
        count = max(1, COUNTED * len(source.train) // total)
        for index in np.linspace(0, len(source.train) - 1, count).astype(int).tolist():
            yield source.prompt_templates[0].replace("{}", source.train.rules.fixed(source.train.texts(index)))


def _counted(prompts: Iterable[str], tags: Counter[str], backbone: Backbone, total: int, counted: int) -> CaptionFacts:
    limit = backbone.prompt_limit.tokens
    longest, longest_tokens, count, cut = "", 0, 0, 0
    iterator = iter(prompts)
    with bar("Counting tokens of captions", total) as progress:
        while texts := list(itertools.islice(iterator, _AT_ONCE)):
            count += len(texts)
            for text, length in zip(texts, count_tokens(backbone, texts), strict=True):
                cut += length > limit
                if length > longest_tokens:
                    longest, longest_tokens = text, length
            progress(len(texts))
    return CaptionFacts(total, counted, count, longest, longest_tokens, limit, cut, dict(tags.most_common(_MOST_TAGS)))
