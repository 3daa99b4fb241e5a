"""Detection of repository ids of the Hugging Face Hub."""

from __future__ import annotations

import pytest

from sdtune.paths import is_hub_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runwayml/stable-diffusion", True),
        ("pocket", False),
        ("/models/sd15", False),
        ("./sd15", False),
        ("~/sd15", False),
        ("models/sd/15", False),
    ],
)
def test_only_owner_slash_name_is_a_hub_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
