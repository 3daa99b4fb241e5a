"""Captions as prompts: texts or tags, in the words and rules of kohya's sd-scripts; drawn anew for each use.

Follows ``process_caption`` of kohya's sd-scripts (library/train_util.py, version 0.9): wildcards, tags that are kept,
shuffled or dropped, and groups of tags. Every draw is a function of the seed, the step and the position in the batch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Interval

from sdtune.errors import UserError

MAX_VARIANTS = 64
"""Variants of a caption up to which all of them are encoded before training, if the captions are cached."""


@dataclass(frozen=True)
class CaptionTexts:
    """What a data set says of one image.

    Args:
        captions: alternative captions, which may have several lines; empty: the image has none.
        weights: probability of each caption, relative to the others; empty: equal.
        sentences: alternative descriptions in sentences, beside captions of tags.
    """

    captions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Captions:
    """Settings of the captions, those of kohya's sd-scripts.

    Args:
        kind: ``text``: a caption is used as it is; ``tags``: it is a list of tags.
        lines: each line of a caption is a caption of its own, of which one is drawn each time.
        sentences: share of the uses of an image that take its sentence (``.caption``) instead of its tags (``.txt``).
        separator: text between two tags.
        shuffle: shuffle the tags, except those that are kept.
        keep_tokens: number of first tags that are neither shuffled nor dropped.
        keep_tokens_separator: text in a caption that ends the tags that are kept; a second one begins kept tags at the
            end. It replaces ``keep_tokens``.
        secondary_separator: text that joins tags into a group, which is shuffled and dropped as one tag.
        caption_tag_dropout_rate: probability that a tag is left out.
        never_dropped: tags that are never left out; the trigger and the kept tags never are.
        prefix, suffix: text before and after each caption, with a space between.
        wildcards: of ``{red|blue}`` in a caption, one is drawn each time; ``{{`` and ``}}`` stand for braces.
    """

    kind: Literal["text", "tags"] = "text"
    lines: bool = False
    sentences: Annotated[float, Interval(ge=0, le=1)] = 0.0
    separator: str = ","
    shuffle: bool = False
    keep_tokens: Annotated[int, Ge(0)] = 0
    keep_tokens_separator: str | None = "|||"
    secondary_separator: str | None = ";;;"
    caption_tag_dropout_rate: Annotated[float, Interval(ge=0, le=1)] = 0.0
    never_dropped: Sequence[str] = ()
    prefix: str | None = None
    suffix: str | None = None
    wildcards: bool = False

    def __post_init__(self) -> None:
        if not self.separator:
            raise UserError("the text is empty", key="data.captions.separator", remedy='set a text such as ","')
        if self.kind == "tags":
            return
        defaults = Captions(kind="tags")
        for name in _ONLY_FOR_TAGS:
            if getattr(self, name) != getattr(defaults, name) and (getattr(self, name) or name == "separator"):
                raise UserError(
                    "has no effect on captions of kind text",
                    key=f"data.captions.{name}",
                    remedy="set data.captions.kind=tags",
                )

    @property
    def draws_tags(self) -> bool:
        """Whether the tags of a caption are drawn anew for each use, so that its embeddings cannot be cached."""
        return self.kind == "tags" and (self.shuffle or self.caption_tag_dropout_rate > 0)


_ONLY_FOR_TAGS = (
    *("separator", "shuffle", "keep_tokens", "keep_tokens_separator", "secondary_separator"),
    *("caption_tag_dropout_rate", "never_dropped", "sentences"),
)


@dataclass(frozen=True)
class CaptionRules:
    """From the captions of a data set to the prompts of a training.

    Args:
        settings: settings of the captions.
        prompt: caption of an image that has none.
        trigger: word put before captions that do not start with it.
    """

    settings: Captions = Captions()
    prompt: str | None = None
    trigger: str | None = None

    def __str__(self) -> str:
        settings, defaults = self.settings, Captions()
        changed = {
            f.name: value for f in fields(Captions) if (value := getattr(settings, f.name)) != getattr(defaults, f.name)
        }
        return repr((changed, self.prompt, self.trigger))

    def fixed(self, texts: CaptionTexts) -> str:
        """The caption for validation and previews: the first one, its tags in order, the first of each wildcard."""
        return self._in_order(self._alternatives(texts)[0][0])

    def draw(self, texts: CaptionTexts, random: Callable[[], np.random.Generator]) -> str:
        """A caption for one use of the image.

        Args:
            random: makes the generator of this use; called only if there is something to draw.
        """
        alternatives, rng = self._alternatives(texts), None
        uses_sentence = self.settings.sentences > 0 and bool(texts.sentences)
        if len(alternatives) > 1 or uses_sentence or self.settings.wildcards or self.settings.draws_tags:
            rng = random()
        if rng is None:
            return self._in_order(alternatives[0][0])
        if uses_sentence and rng.random() < self.settings.sentences:
            sentence = _one_line(texts.sentences[int(rng.integers(len(texts.sentences)))])
            return self._around(sentence)
        caption = alternatives[0][0]
        if len(alternatives) > 1:
            weights = np.array([weight for _, weight in alternatives])
            caption = alternatives[int(rng.choice(len(alternatives), p=weights / weights.sum()))][0]
        return self._tags_drawn(self._with_wildcards(caption, lambda some: some[int(rng.integers(len(some)))]), rng)

    def variants(self, texts: CaptionTexts) -> list[str] | None:
        """All captions that :meth:`draw` can return; None if there are too many to encode them before training."""
        if self.settings.draws_tags:
            return None
        found: list[str] = []
        for caption, _ in self._alternatives(texts):
            for number, variant in enumerate(self._wildcard_variants(caption)):
                if number == MAX_VARIANTS:
                    return None
                found.append(self._tags_in_order(variant))
        if self.settings.sentences > 0:
            found += [self._around(_one_line(sentence)) for sentence in texts.sentences]
        return list(dict.fromkeys(found))

    def _alternatives(self, texts: CaptionTexts) -> list[tuple[str, float]]:
        """The captions to draw from, each on one line, with their weights."""
        captions = texts.captions if texts.captions else (self.prompt or "",)
        weights = texts.weights or (1.0,) * len(captions)
        if not self.settings.lines:
            return [(_one_line(caption), weight) for caption, weight in zip(captions, weights, strict=True)]
        split = [
            (_one_line(line), weight)
            for caption, weight in zip(captions, weights, strict=True)
            for line in caption.splitlines()
            if line.strip()
        ]
        return split or [("", 1.0)]

    def _around(self, caption: str) -> str:
        """``caption`` with trigger, prefix and suffix."""
        separator = self.settings.separator if self.settings.kind == "tags" else ","
        parts = (self.settings.prefix, with_trigger(caption, self.trigger, separator), self.settings.suffix)
        return " ".join(part for part in parts if part)

    def _in_order(self, caption: str) -> str:
        """``caption`` without draws."""
        return self._tags_in_order(self._with_wildcards(caption, lambda choices: choices[0]))

    def _with_wildcards(self, caption: str, choose: Callable[[list[str]], str]) -> str:
        caption = self._around(caption)
        if not self.settings.wildcards:
            return caption
        return "".join(part if isinstance(part, str) else choose(part) for part in _wildcard_parts(caption))

    def _wildcard_variants(self, caption: str) -> Iterator[str]:
        caption = self._around(caption)
        parts = _wildcard_parts(caption) if self.settings.wildcards else [caption]
        for choice in itertools.product(*([part] if isinstance(part, str) else part for part in parts)):
            yield "".join(choice)

    def _tags_in_order(self, caption: str) -> str:
        if self.settings.kind == "text":
            return caption
        return self._joined(*self._split(caption))

    def _tags_drawn(self, caption: str, rng: np.random.Generator) -> str:
        settings = self.settings
        if settings.kind == "text":
            return caption
        first, middle, last = self._split(caption)
        if settings.shuffle:
            middle = [middle[int(i)] for i in rng.permutation(len(middle))]
        if settings.caption_tag_dropout_rate > 0:
            kept = rng.random(len(middle)) >= settings.caption_tag_dropout_rate
            middle = [tag for tag, keep in zip(middle, kept, strict=True) if keep or tag in settings.never_dropped]
        return self._joined(first, middle, last)

    def _joined(self, *parts: list[str]) -> str:
        caption = ", ".join(itertools.chain(*parts))
        group = self.settings.secondary_separator
        return caption.replace(group, self.settings.separator) if group else caption

    def _split(self, caption: str) -> tuple[list[str], list[str], list[str]]:
        """Tags that are kept at the start, the others, and tags that are kept at the end."""
        end = self.settings.keep_tokens_separator
        if end and end in caption:
            parts = [self._tags(part) for part in caption.split(end, 2)]
            return parts[0], parts[1], parts[2] if len(parts) > 2 else []
        tags = self._tags(caption)
        # The trigger stands after the prefix.
        until_trigger = " ".join(part for part in (self.settings.prefix, self.trigger) if part) if self.trigger else ""
        kept = max(self.settings.keep_tokens, len(self._tags(until_trigger)))
        return tags[:kept], tags[kept:], []

    def _tags(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self.settings.separator) if tag.strip()]


def _wildcard_parts(caption: str) -> list[str | list[str]]:
    """Texts between the wildcards of ``caption``, and the choices of each wildcard, in order."""

    def unescaped(text: str) -> str:
        return text.replace(_OPEN, "{").replace(_CLOSE, "}")

    caption = caption.replace("{{", _OPEN).replace("}}", _CLOSE)
    parts: list[str | list[str]] = []
    end = 0
    for match in re.finditer(r"\{([^}]+)\}", caption):
        parts += [unescaped(caption[end : match.start()]), [unescaped(choice) for choice in match[1].split("|")]]
        end = match.end()
    return [*parts, unescaped(caption[end:])]


_OPEN, _CLOSE = "\ue000", "\ue001"
"""Stand for escaped braces: characters of Unicode's private use area."""


def with_trigger(caption: str, trigger: str | None, separator: str = ",") -> str:
    """``caption`` with ``trigger`` and ``separator`` before it, unless it starts with the trigger."""
    # Match complete words: "sksy dog" and "sks-style" do not start with the trigger "sks".
    if not trigger or re.match(rf"{re.escape(trigger)}(?![\w-])", caption):
        return caption
    return f"{trigger}{separator.rstrip()} {caption}" if caption else trigger


def _one_line(text: str) -> str:
    return " ".join(text.split())
