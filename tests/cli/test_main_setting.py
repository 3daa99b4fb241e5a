"""Main settings without a key: ``sdtune export RUN``."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtune.cli.main_setting import with_main_setting
from sdtune.errors import UserError


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("export", ["outputs/my run", "format=kohya"], ['run="outputs/my run"', "format=kohya"]),
        ("export", ["run=x"], ["run=x"]),
        ("evaluate", ["outputs/x"], ["run=outputs/x"]),
        ("sample", ["seeds=[1]", "a red frog, sitting"], ["seeds=[1]", 'prompt="a red frog, sitting"']),
        ("sample", ["a sign that says x=1"], ['prompt="a sign that says x=1"']),
        ("sample", ["1e5"], ['prompt="1e5"']),
        ("sample", ["[a, b]", "~sampling.seed"], ["prompt=[a, b]", "~sampling.seed"]),
        ("sample", ["prompt=a", "frog"], ["prompt=a", "frog"]),
        ("train", ["method.rank"], ["method.rank"]),
        ("caption", ["my photos", "model=a/b"], ['data.path="my photos"', "model=a/b"]),
        ("mask", ["photos", "words=cat"], ["data.path=photos", "words=cat"]),
    ],
)
def test_key_is_added(command: str, given: list[str], expected: list[str]) -> None:
    assert with_main_setting(command, given) == expected


def test_file_to_export_is_an_artifact(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    file.touch()
    assert with_main_setting("export", [str(file), "format=kohya"]) == [f"artifact={file}", "format=kohya"]


def test_run_folder_may_contain_an_equals_sign(tmp_path: Path) -> None:
    run = tmp_path / "rank=8"
    (run / ".hydra").mkdir(parents=True)
    assert with_main_setting("export", [str(run), "format=kohya"]) == [f'run="{run}"', "format=kohya"]
    assert with_main_setting("evaluate", ["~/runs/x"]) == ['run="~/runs/x"']


def test_run_beside_a_prompt_is_to_be_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    with pytest.raises(UserError, match=f"name the run: sdtune sample 'a cat, asleep' run={run} seeds=1$"):
        with_main_setting("sample", ["a cat, asleep", str(run), "seeds=1"])
