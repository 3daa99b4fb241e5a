"""``sdtune completion``: candidates for a line, and the scripts of bash, zsh and fish."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdtune.cli.completion import main
from sdtune.cli.main import COMMANDS
from sdtune.errors import UserError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my photos").mkdir()
    (tmp_path / "net.safetensors").touch()
    (tmp_path / ".hidden").touch()
    monkeypatch.chdir(tmp_path)


def candidates(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("SDTUNE_LINE", line)
    main(["query"], tuple(COMMANDS))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sdtune ", list(COMMANDS)),
        ("sdtune pl", ["plan"]),
        ("sdtune train method=", ["controlnet", "dreambooth", "full", "lora", "textual_inversion"]),
        ("sdtune train method.ra", ["method.rank="]),
        ("sdtune train method=dreambooth method.te", ["method.text_encoder_lr="]),
        ("sdtune train meth", ["method=", "method."]),
        ("sdtune train method.rank=", []),
        ("sdtune train -m hydra/la", ["hydra/launcher="]),
        ("sdtune sample samplin", ["sampling."]),
        ("sdtune sample sampling.sampler=e", ["euler", "euler_ancestral"]),
        ("sdtune plan backbone=sdx", ["sdxl"]),
        ("sdtune train backbone.allow_pickle=", ["true", "false"]),
        ("sdtune export RUN format=k", ["kohya"]),
        ("sdtune train data=folder data.path=", ["my photos/", "net.safetensors"]),
        ("sdtune train data=folder data.path=my", ["my photos/"]),
        ('sdtune train data=folder data.path="my', []),
        ("sdtune train data=folder data.prompt=", []),
        ("sdtune train resume=./m", ["./my photos/"]),
        ("sdtune sample run=m", ["my photos/"]),
        ("sdtune report m", ["my photos/"]),
        ("sdtune export n", ["net.safetensors"]),
        ("sdtune caption m", ["my photos/", "model=", "max_new_tokens="]),
        ("sdtune mask DIR model=m", ["my photos/"]),
        ("sdtune train -cd ", ["my photos/"]),
        ("sdtune train --cfg ", ["job", "hydra", "all"]),
        ("sdtune train --conf", ["--config-dir"]),
        ("sdtune completion z", ["zsh"]),
        ("sdtune cache m", ["max_gib="]),
        ("sdtune train data=nonsense method=fu", ["full"]),
        ("sdtune unknown ", []),
    ],
)
def test_candidates(
    line: str, expected: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = candidates(line, capsys, monkeypatch)
    word = line.rpartition(" ")[2]
    key = word.partition("=")[0] + "=" if "=" in word else ""
    assert found == [key + value for value in expected]


def run(shell: str, script: str) -> str:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [program, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    return done.stdout


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("sdtune tr", "[train ]"),
        ("sdtune train method=fu", "[full ]"),
        ("sdtune train data=folder data.path=my", "[my\\ photos/]"),
        ("sdtune train data=folder data.path=my\\ ph", "[my\\ photos/]"),
        ("sdtune train method.ran", "[method.rank=]"),
    ],
)
def test_bash_replaces_the_part_after_the_equals_sign(line: str, replies: str) -> None:
    script = f"""source <(sdtune completion bash)
COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=(sdtune); _sdtune; printf '[%s]' "${{COMPREPLY[@]}}" """
    assert run("bash", script) == replies


def test_fish_completes() -> None:
    script = "sdtune completion fish | source; complete -C 'sdtune train method=fu'; complete -C 'sdtune report m'"
    assert run("fish", script).splitlines() == ["method=full", "my photos/"]


def test_zsh_script_is_valid() -> None:
    assert "_sdtune" in run(
        "zsh", "autoload -Uz compinit; compinit -D; source <(sdtune completion zsh); whence -f _sdtune"
    )


def test_unknown_shell_is_refused() -> None:
    with pytest.raises(UserError, match="completion: expected a shell, got tcsh; use sdtune completion bash|zsh|fish"):
        main(["tcsh"], tuple(COMMANDS))
