"""Prompts of a data set: captions in their templates, read one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from sdtune.data.captions import CaptionRules, CaptionTexts
from sdtune.data.samples import Samples

if TYPE_CHECKING:
    from sdtune.data.datamodule import ImageDataModule


def distinct(parts: Iterable[Iterable[str]]) -> Iterator[str]:
    """The texts of ``parts``, each once."""
    seen: set[str] = set()
    for text in itertools.chain.from_iterable(parts):
        if text not in seen:
            seen.add(text)
            yield text


def of_samples(samples: Samples, templates: Sequence[str]) -> Iterator[str]:
    """Every caption in every template."""
    return (template.replace("{}", caption) for caption in samples.captions() for template in templates)


def of_source(source: ImageDataModule) -> Iterator[str]:
    """Prompts of training and validation without draws, and those of class images and dropped captions."""
    yield from of_samples(source.train, source.prompt_templates)
    yield from of_samples(source.held_out, source.prompt_templates[:1])
    yield from _fixed_prompts(source)


def _fixed_prompts(source: ImageDataModule) -> Iterator[str]:
    """Prompts of class images and dropped captions."""
    for sample in source.class_samples:
        yield CaptionRules().fixed(CaptionTexts((sample.caption,)))
    if source.caption_dropout:
        yield source.caption_dropout_prompt
        if source.has_prior:  # captions of class images have no trigger word, so a dropped one is empty
            yield ""


def variants_of_sources(sources: Sequence[ImageDataModule]) -> list[str] | None:
    """All prompts that a training on ``sources`` can use; None if they are too many to be encoded before it."""
    if any(source.captions.draws_tags for source in sources):
        return None
    found: dict[str, None] = {}
    for source in sources:
        templates = source.prompt_templates
        for samples, used in ((source.train, templates), (source.held_out, templates[:1])):
            for texts in samples.every_texts():
                variants = samples.rules.variants(texts)
                if variants is None:
                    return None
                found |= dict.fromkeys(t.replace("{}", v) for v in variants for t in used)
        found |= dict.fromkeys(_fixed_prompts(source))
    return list(found)
