"""Prompts with more tokens than the text encoder accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtune.backbone import Pretrained
from sdtune.sampling.prompts import warn_about_truncated_prompts


def test_truncated_prompt_is_logged_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = " ".join(["a"] * 76)  # 78 tokens with the start and end tokens; the limit is 77
    warn_about_truncated_prompts(Pretrained(str(tiny)).load(), ["a fox", long, long, long[2:]])
    assert [record.getMessage() for record in caplog.records if record.name == "sdtune"] == [
        f"WARNING: the prompt has 78 tokens and is truncated to 77: {long}"
    ]
