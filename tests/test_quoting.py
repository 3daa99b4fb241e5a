"""Quoted values come back as they were, through Hydra's grammar and through a shell."""

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
    """What a config holds after the override ``text``."""
    parsed = OverridesParser.create().parse_override(text)
    assert not parsed.is_sweep_override()
    return str(OmegaConf.create({"key": parsed.value(), "x": "interpolated"}).key)


@pytest.mark.parametrize("text", TEXTS)
def test_hydra_reads_back_the_same_text(text: str) -> None:
    assert read_by_hydra(override("key", text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_shell_and_then_hydra_read_back_the_same_text(text: str) -> None:
    [word] = shlex.split(shell_override("key", text))
    assert read_by_hydra(word) == text


def test_a_plain_path_stays_readable() -> None:
    assert quoted("outputs/2026-11-29/10-00-00") == "outputs/2026-11-29/10-00-00"
    assert shell_override("resume", "outputs/a b") == "'resume=\"outputs/a b\"'"
    assert shell_override("resume", "it's") == '"resume=\\"it\'s\\""'
