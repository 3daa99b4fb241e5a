"""Quoted values are unchanged after parsing by a shell and by Hydra."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sdtune.quoting import override, quoted, shell_override

TEXTS = (
    *(
        "outputs/runs/a",
        "it's [1,2] a=b",
        'a "b" c',
        "a\\",
        "a\\'b",
        'a\\"b',
        "\\\\'",
        "${x}",
        "a\\${x}",
        "a, b",
        "(1)",
    ),
    *(
        "",
        " a ",
        "null",
        "True",
        "12",
        "1e3",
        ".5",
        ".5e3",
        "-1",
        "1_0",
        "x#y",
        "C:\\d",
        "~/x",
        "ümlaut é",
        "$HOME `b` !",
        "{a: b}",
        "a\tb",
    ),
)


def read_by_hydra(text: str) -> str:
    """Value in the config after the override ``text``."""
    parsed = OverridesParser.create().parse_override(text)
    assert not parsed.is_sweep_override()
    return str(OmegaConf.create({"key": parsed.value(), "x": "interpolated"}).key)


@pytest.mark.parametrize("text", TEXTS)
def test_hydra_parses_the_original_text(text: str) -> None:
    assert read_by_hydra(override("key", text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_shell_and_hydra_parse_the_original_text(text: str) -> None:
    [word] = shlex.split(shell_override("key", text))
    assert read_by_hydra(word) == text


def test_plain_path_is_not_quoted() -> None:
    assert quoted("outputs/2026-11-29/10-00-00") == "outputs/2026-11-29/10-00-00"
    assert shell_override("resume", "outputs/a b") == "'resume=\"outputs/a b\"'"
    assert shell_override("resume", "it's") == '"resume=\\"it\'s\\""'
