"""The trigger words of a data set, found from its captions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

_WORDS_OF_TEMPLATES = frozenset(
    (
        *(
            "a",
            "an",
            "the",
            "of",
            "in",
            "on",
            "at",
            "with",
            "and",
            "by",
            "for",
            "from",
            "to",
            "my",
            "this",
            "that",
            "is",
        ),
        *("photo", "photograph", "picture", "image", "drawing", "painting", "illustration", "rendering", "sketch"),
        *("art", "style", "close-up", "cropped"),
    )
)
"""Words around the subject in usual captions; they do not call it."""
_MOST_WORDS = 3
_MOST_CAPTIONS = 1000


def trigger_words(captions: Iterable[str]) -> str | None:
    """The longest sequence of words that all captions have, without the words of templates at its ends.

    ``sks dog`` for "a photo of sks dog" and "sks dog in the snow". None if there is no such sequence, or if it is
    longer than a name, as a prompt that describes the only image.
    """
    distinct = list(dict.fromkeys(itertools.islice(captions, _MOST_CAPTIONS)))
    texts = [re.findall(r"[^\s,.;:!?()]+", caption) for caption in distinct]
    if not texts or not all(texts):
        return None
    shortest = min(texts, key=len)
    others = [_padded(words) for words in texts if words is not shortest]
    for length in range(len(shortest), 0, -1):
        for first in range(len(shortest) - length + 1):
            words = shortest[first : first + length]
            # A longer sequence may have fewer words of its own: "photo of a" has none.
            own = _without_template(words)
            if len(own) == length and all(_padded(words) in other for other in others):
                return " ".join(own) if length <= _MOST_WORDS else None
    return None


def _padded(words: Sequence[str]) -> str:
    return f" {' '.join(words).lower()} "


def _without_template(words: Sequence[str]) -> list[str]:
    """``words`` from the first to the last one that is not of a template."""
    own = [number for number, word in enumerate(words) if word.lower() not in _WORDS_OF_TEMPLATES]
    return list(words[own[0] : own[-1] + 1]) if own else []
