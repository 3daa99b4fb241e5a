"""Pages that people write, with a part between two marks that metrics are written into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdtune.errors import UserError
from sdtune.files import write_text

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def rewrite(page: Path, lines: Sequence[str]) -> None:
    """Put ``lines`` between the marks of ``page``; UserError where it lacks one."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} has no {END if begin else BEGIN}, between which the metrics go; put it back")
    write_text(page, "\n".join([before + BEGIN, "", *lines, "", END + after]))
