"""Prompts that are longer than what a backbone reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtune.backbone import Pretrained
from sdtune.sampling.prompts import warn_of_cut_prompts


def test_a_prompt_that_is_cut_is_named_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = " ".join(["a"] * 76)  # with the tokens of beginning and end one more than the window
    warn_of_cut_prompts(Pretrained(str(tiny)).load(), ["a fox", long, long, long[2:]])
    assert [record.getMessage() for record in caplog.records if record.name == "sdtune"] == [
        f"WARNING: the prompt has 78 tokens and is cut after 77: {long}"
    ]
