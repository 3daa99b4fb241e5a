"""Main setting of a command, whose key may be omitted: ``sdtune export RUN`` is ``sdtune export run=RUN``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sdtune.cli.messages import joined_brackets
from sdtune.errors import UserError
from sdtune.quoting import in_quotes, override, shell_override, shell_word

_KEYS = {"sample": "prompt", "export": "run", "evaluate": "run", "caption": "data.path", "mask": "data.path"}

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
        others = [text for text in joined if text not in bare]
        raise UserError(
            f"sdtune {command}: {len(bare)} words without a key ({' '.join(bare)})",
            remedy=_remedy(command, bare, "".join(f" {shell_word(text)}" for text in others)),
        )
    [text] = bare
    if command == "export" and Path(text).expanduser().is_file():
        key = "artifact"
    named = f"{key}={text}" if text.startswith("[") else override(key, text)
    return [named if other == text else other for other in overrides]


def _remedy(command: str, bare: Sequence[str], others: str) -> str:
    """What to write instead of several words without a key; ``others`` are the words with one."""
    if command != "sample":
        return f"use one run, file or folder per command: sdtune {command} {shell_word(bare[0])}{others}"
    run = next(filter(_is_run, bare), None)
    if run is not None:
        prompt = " ".join(text for text in bare if text != run) or "PROMPT"
        return f"name the run: sdtune sample {shell_word(prompt)} {shell_override('run', run)}{others}"
    files = [text for text in bare if Path(text).suffix == ".safetensors" and Path(text).expanduser().is_file()]
    texts = [text for text in bare if text not in files]
    if files:
        entries = ", ".join(f"{{path: {in_quotes(file)}}}" for file in files)
        prompt, adapters = shell_word(" ".join(texts) or "PROMPT"), shell_word(f"adapters=[{entries}]")
        return f"name the adapters: sdtune sample {prompt} {adapters}{others}"
    if all(" " in text for text in texts):
        prompts = ",".join(in_quotes(text) for text in texts)
        return f"write a list: sdtune sample {shell_word(f'prompt=[{prompts}]')}{others}"
    return f"put quotes around a text: sdtune sample {shell_word(' '.join(texts))}{others}"


def _is_run(text: str) -> bool:
    """Whether ``text`` is an existing run folder, whose path may contain ``=``."""
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    try:
        return (path / ".hydra").is_dir()
    except OSError:  # a prompt that is too long for a path
        return False
