"""What is taken for a repository's name on the Hugging Face Hub."""

from __future__ import annotations

import pytest

from sdtune.paths import is_hub_id


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("runwayml/stable-diffusion", True),
        ("pocket", False),
        ("/models/sd15", False),
        ("./sd15", False),
        ("~/sd15", False),
        ("models/sd/15", False),
    ],
)
def test_a_name_with_an_owner_is_a_hub_id(name: str, is_one: bool) -> None:
    assert is_hub_id(name) is is_one
