"""Hand-written Markdown pages with a generated section between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdtune.errors import UserError
from sdtune.files import write_text

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def rewrite(page: Path, lines: Sequence[str]) -> None:
    """Replace the section between the marks of ``page`` with ``lines``.

    Raises:
        UserError: a mark is missing.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(
            f"{page} has no mark {END if begin else BEGIN}",
            remedy=f"add {BEGIN} and {END} around the generated section",
        )
    write_text(page, "\n".join([before + BEGIN, "", *lines, "", END + after]))
