"""Prompts of a data set: captions in their templates, read one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sdtune.data.captions import CaptionRules, CaptionTexts
from sdtune.data.samples import SampleSequence


@dataclass(frozen=True)
class PromptSource:
    """What the prompts of a source are made from.

    Args:
        train, held_out: samples of training and validation.
        templates: prompt templates with ``{}`` for the caption; validation uses the first.
        class_captions: captions of the class images.
        dropped: prompts that replace dropped captions; empty without caption dropout.
    """

    train: SampleSequence
    held_out: SampleSequence
    templates: Sequence[str]
    class_captions: Sequence[str]
    dropped: Sequence[str]

    def of_training(self) -> Iterator[str]:
        """Every caption of the training in every template, without draws."""
        return (t.replace("{}", caption) for caption in self.train.captions() for t in self.templates)

    def every(self) -> Iterator[str]:
        """Prompts of training and validation without draws, and those of class images and dropped captions."""
        yield from self.of_training()
        yield from (self.templates[0].replace("{}", caption) for caption in self.held_out.captions())
        yield from self._of_settings()

    def _of_settings(self) -> Iterator[str]:
        yield from (CaptionRules().fixed(CaptionTexts((caption,))) for caption in self.class_captions)
        yield from self.dropped

    def variants(self) -> Iterator[list[str] | None]:
        """All prompts that a training can use, for one sample after the other; None for one that has too many."""
        for samples, templates in ((self.train, self.templates), (self.held_out, self.templates[:1])):
            for texts in samples.every_texts():
                captions = samples.rules.variants(texts)
                yield None if captions is None else [t.replace("{}", c) for c in captions for t in templates]
        yield list(self._of_settings())


def in_turn(parts: Sequence[Iterator[str]]) -> Iterator[str]:
    """The first text of each of ``parts``, the second of each, and so on."""
    return (text for texts in itertools.zip_longest(*parts) for text in texts if text is not None)


def distinct(texts: Iterable[str]) -> Iterator[str]:
    """The ``texts``, each once."""
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def all_variants(sources: Sequence[PromptSource]) -> list[str] | None:
    """All prompts that a training on ``sources`` can use; None if they are too many to be encoded before it."""
    if any(source.train.rules.settings.draws_tags for source in sources):
        return None
    found: dict[str, None] = {}
    for source in sources:
        for prompts in source.variants():
            if prompts is None:
                return None
            found |= dict.fromkeys(prompts)
    return list(found)
