"""``sdtune COMMAND --help``: each setting of the composed config with its description."""

from __future__ import annotations

import re

import pytest

from sdtune.cli.help import TEXTS, print_help
from sdtune.config.compose import search_path


def help_text(capsys: pytest.CaptureFixture[str], command: str, *overrides: str, columns: int = 100) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        print_help(command, search_path(None), overrides)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "prepare", "sample", "plan", "export", "evaluate", "caption", "mask"])
def test_each_setting_has_a_description(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_text(capsys, command).splitlines()
    settings = lines[next(i for i, line in enumerate(lines) if line.startswith("settings")) + 1 :]
    rows = [i for i, line in enumerate(settings) if re.match(r"  [a-z_.]+=", line)]
    assert len(rows) >= (4 if command == "evaluate" else 10)
    without = [
        settings[i]
        for i in rows
        if not settings[i][38:].strip() and not (i + 1 < len(settings) and settings[i + 1].startswith(" " * 38))
    ]
    assert without == []


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_help_fits_the_terminal(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_text(capsys, "train", columns=columns).splitlines()
    too_long = [line for line in lines if len(line) > columns and " " in line.strip()]
    assert too_long == []


def test_help_shows_the_settings_of_the_chosen_options(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_text(capsys, "train", "method=controlnet", "data=folder", "seed=7")
    assert "*controlnet" in shown
    assert "method.rank=" not in shown
    assert "data.prompt=" in shown
    assert "  seed=7 " in shown


def test_sample_shows_its_own_groups_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_text(capsys, "sample")
    groups = shown.partition("\ngroups")[2].partition("\nsettings")[0]
    assert re.findall(r"^  (\w+)", groups, re.MULTILINE) == ["experiment", "backbone", "hardware"]
    assert "sample/map_with_lora" in groups
    assert "lora_subject" not in groups


def test_description_ends_with_the_type(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(help_text(capsys, "train").split())
    assert TEXTS["method=lora"]["method.rank"].endswith("(int >= 1 or null)")
    assert TEXTS["method=lora"]["method.rank"] in shown
