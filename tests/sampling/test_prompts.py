"""Prompts with more tokens than the text encoder accepts, and words that no prompt uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtune.backbone import Pretrained
from sdtune.backbone.new_token_vectors import initialize_tokens
from sdtune.backbone.new_tokens import NewToken, check_vector_counts
from sdtune.errors import UserError
from sdtune.sampling.prompts import warn_about_other_syntax, warn_about_truncated_prompts, warn_about_unused_words


def test_end_of_a_long_prompt_is_warned_about_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    end = "a a a a"
    long = f"{' '.join(['a'] * 75)} {end}"  # 75 tokens fit between the start and end tokens
    backbone = Pretrained(str(tiny)).load()
    initialize_tokens(backbone, [NewToken("<my_cat>", "cat", vectors=2)])
    warn_about_truncated_prompts(backbone, ["a fox", long, long, " ".join(["a"] * 75), f"{long} <my_cat>"])
    assert [record.getMessage() for record in caplog.records if record.name == "sdtune"] == [
        "WARNING: a prompt has 81 tokens, the limit is 77; its end is not used: 'a a a a'",
        "WARNING: a prompt has 83 tokens, the limit is 77; its end is not used: 'a a a a <my_cat>'",
    ]


def test_word_that_no_prompt_uses_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    warn_about_unused_words(["<my_cat>", "sks"], ["a my_cat", "a photo of SKS, at night"])
    assert [record.getMessage() for record in caplog.records] == [
        "WARNING: the word <my_cat> of the adapters occurs in no prompt, so it has no effect"
    ]


def test_syntax_of_other_programs_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    warn_about_other_syntax(["a (sks dog:1.2) on grass (at night)", "a cat <lora:hog:0.8>", "(sks dog:1.2)"])
    assert [record.getMessage() for record in caplog.records] == [
        "WARNING: (sks dog:1.2), <lora:hog:0.8> in a prompt is plain text: weights are not supported, and LoRAs are"
        " set by adapters="
    ]


@pytest.mark.parametrize("vectors", [75, 76])
def test_new_token_must_fit_into_a_prompt(vectors: int, tiny: Path) -> None:
    facts = Pretrained(str(tiny)).facts
    if vectors == 75:
        check_vector_counts({"<a>": vectors}, facts, "text_encoder", "new_tokens")
        return
    message = (
        r"^new_tokens: '<a>' has 76 vectors, but a prompt of text_encoder has room for 75; .*backbone\.max_tokens$"
    )
    with pytest.raises(UserError, match=message):
        check_vector_counts({"<a>": vectors}, facts, "text_encoder", "new_tokens")
