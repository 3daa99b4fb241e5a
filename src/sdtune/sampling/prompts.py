"""Prompt files in the format of kohya's sample prompts, and a warning for prompts that are cut."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdtune.backbone.backbone import Backbone
from sdtune.errors import UserError

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class PromptLine:
    """A prompt with what its line says beside it; None where it says nothing."""

    prompt: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None


def warn_of_cut_prompts(backbone: Backbone, prompts: Iterable[str]) -> None:
    """A warning for each of ``prompts`` that is longer than what ``backbone`` reads."""
    limit = backbone.facts.max_tokens
    for prompt in dict.fromkeys(prompts):
        length = backbone.count_tokens(prompt)
        if length > limit:
            log.warning("WARNING: the prompt has %d tokens and is cut after %d: %s", length, limit, prompt)


_OPTIONS = {"n": "negative", "w": "width", "h": "height", "d": "seed", "l": "guidance", "s": "steps"}
_KINDS = {"negative": str, "width": int, "height": int, "seed": int, "guidance": float, "steps": int}


def read_prompt_file(path: str) -> list[PromptLine]:
    """One prompt a line; ``--n`` negative, ``--w --h`` pixels, ``--d`` seed, ``--s`` steps, ``--l`` guidance.

    Empty lines and lines that begin with ``#`` are passed over. UserError names file and line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path} is not a file", key="prompts_file")
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        prompt, *parts = text.split(" --")
        found: dict[str, object] = {}
        for part in parts:
            letter, _, value = part.strip().partition(" ")
            key = _OPTIONS.get(letter)
            if key is None:
                known = ", ".join(f"--{o}" for o in _OPTIONS)
                raise UserError(f"{path}, line {number}: --{letter} is not known; there are {known}")
            try:
                found[key] = _KINDS[key](value.strip())
            except ValueError as error:
                raise UserError(f"{path}, line {number}: --{letter} {value!r} is not a number") from error
        lines.append(PromptLine(prompt.strip(), **found))  # type: ignore[arg-type]
    if not lines:
        raise UserError(f"{path} holds no prompt", key="prompts_file")
    return lines
