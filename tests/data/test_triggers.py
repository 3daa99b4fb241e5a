"""Trigger words found from captions."""

from __future__ import annotations

import pytest

from sdtune.data.triggers import trigger_words


@pytest.mark.parametrize(
    ("captions", "found"),
    [
        (["a photo of sks otter"], "sks otter"),
        (["a photo of a big sks bird on a red background", "a photo of a sks bird, on the left"], "sks bird"),
        (["ohwx man, standing, park", "ohwx man, sitting"], "ohwx man"),
        (["<my_cat> in the snow", "a drawing of <my_cat>"], "<my_cat>"),
        (["Sks dog", "sks dog running"], "Sks dog"),
        (["a cat on a chair", "a dog in the snow"], None),
        (["a photo of the", "a photo of a"], None),
        (["an old wooden boat with red sails under a blue sky at noon"], None),
        (["", "a photo of sks"], None),
        ([], None),
    ],
)
def test_trigger_is_what_all_captions_have_in_common(captions: list[str], found: str | None) -> None:
    assert trigger_words(captions) == found
