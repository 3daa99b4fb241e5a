"""Names of artifacts."""

from __future__ import annotations

import pytest

from sdtune.config.settings import check_name
from sdtune.errors import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_lora_weights", "is the file name of the diffusers format; set name=NAME"),
        ("caf\udce9", r"is not UTF-8; set name=NAME"),
        ("\N{CAT FACE}" * 51, r"is 204 bytes long, max 200; set name=NAME"),
    ],
)
def test_name_that_cannot_be_a_file_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^name: .*{message}"):
        check_name(name)


def test_usual_names_are_accepted() -> None:
    for name in ("otter", "\N{CAT FACE}" * 50, "it's [1,2] a=b"):
        check_name(name)
