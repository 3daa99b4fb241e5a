"""Progress bars show texts of the user as they are."""

from __future__ import annotations

import pytest

from sdtune.progress import bar


def test_title_is_not_read_as_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a class prompt with weights in brackets; rich would raise an error for a closing tag."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar("Generating class images: a dog [/sitting] [red]", 2) as progress:
        progress(1)
    assert "a dog [/sitting] [red]" in capsys.readouterr().err
