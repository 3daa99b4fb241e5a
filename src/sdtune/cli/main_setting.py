"""Main setting of a command, whose key may be omitted: ``sdtune export RUN`` is ``sdtune export run=RUN``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sdtune.cli.messages import joined_brackets
from sdtune.errors import UserError
from sdtune.quoting import in_quotes, override, shell_word

_KEYS = {"sample": "prompt", "export": "run", "evaluate": "run"}

_IS_OVERRIDE = re.compile(r"~(?!/)|[+]{0,2}[\w./@:-]+=")


def with_main_setting(command: str, overrides: list[str]) -> list[str]:
    """``overrides``, with the key of the command's main setting put before a word without a key.

    For ``export``, a file is an artifact, and anything else a run folder.

    Raises:
        UserError: several words without a key.
    """
    key, joined = _KEYS.get(command), joined_brackets(overrides)
    bare = [text for text in joined if not _IS_OVERRIDE.match(text) or _is_run(text)]
    if key is None or not bare or any(text.startswith((f"{key}=", "artifact=")) for text in overrides):
        return overrides
    if len(bare) > 1:
        _refuse_files(command, bare)
        if command == "sample" and all(" " in text for text in bare):
            prompts = ",".join(in_quotes(text) for text in bare)
            raise UserError(
                f"{len(bare)} prompts without a key", remedy=f"write a list: {shell_word(f'prompt=[{prompts}]')}"
            )
        if command != "sample":
            raise UserError(
                f"sdtune {command}: {len(bare)} words without a key ({' '.join(bare)})",
                remedy=f"use one run or file per command: sdtune {command} {shell_word(bare[0])}",
            )
        others = [text for text in joined if text not in bare]
        line = " ".join(shell_word(text) for text in (" ".join(bare), *others))
        raise UserError(
            f"sdtune {command}: {len(bare)} words without a key ({' '.join(bare)})",
            remedy=f"put quotes around a text: sdtune {command} {line}",
        )
    [text] = bare
    if command == "export" and Path(text).expanduser().is_file():
        key = "artifact"
    named = f"{key}={text}" if text.startswith("[") else override(key, text)
    return [named if other == text else other for other in overrides]


def _refuse_files(command: str, bare: Sequence[str]) -> None:
    """Refuse words without a key if some of them are files, which are no part of a text.

    Raises:
        UserError: one of ``bare`` is a file.
    """
    files = [text for text in bare if Path(text).suffix == ".safetensors" and Path(text).expanduser().is_file()]
    if not files or command != "sample":
        return
    message = f"sdtune {command}: {len(bare)} words without a key ({' '.join(bare)})"
    text = " ".join(word for word in bare if word not in files)
    entries = ", ".join(f"{{path: {in_quotes(file)}}}" for file in files)
    raise UserError(
        message, remedy=f"name the adapters: sdtune sample {shell_word(text)} {shell_word(f'adapters=[{entries}]')}"
    )


def _is_run(text: str) -> bool:
    """Whether ``text`` is an existing run folder, whose path may contain ``=``."""
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    try:
        return (path / ".hydra").is_dir()
    except OSError:  # a prompt that is too long for a path
        return False
