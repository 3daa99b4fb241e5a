"""Prompt files in the format of kohya's sample prompts, and warnings about truncated prompts and unused words."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.new_tokens import split_at_tokens
from sdtune.errors import UserError

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class PromptLine:
    """A line of a prompt file; None for an option that the line does not set."""

    prompt: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None


_IN_PROMPT = re.compile(r"(?<!\S)(--[nwhdsl])(?= )")
_OTHER_SYNTAX = re.compile(r"\([^()]+:\d+(\.\d+)?\)|<(lora|lyco|hypernet):[^>]+>")


def warn_about_truncated_prompts(backbone: Backbone, prompts: Iterable[str]) -> None:
    """Log a warning for each of ``prompts`` that has more tokens than ``backbone`` uses."""
    limit = backbone.prompt_limit.tokens
    for prompt in dict.fromkeys(prompts):
        length = count_tokens(backbone, [prompt])[0]
        if length > limit:
            log.warning(
                "WARNING: a prompt has %d tokens, the limit is %d; its end is not used: %r",
                length,
                limit,
                truncated_end(backbone, prompt),
            )


def warn_about_unused_words(words: Collection[str], prompts: Iterable[str]) -> None:
    """Log a warning for each of ``words``, the new tokens of adapters, that occurs in none of ``prompts``."""
    used = {word for prompt in prompts for _, word in split_at_tokens(words, prompt)}
    for word in words:
        if word not in used:
            log.warning("WARNING: the word %s of the adapters occurs in no prompt, so it has no effect", word)


def warn_about_other_syntax(prompts: Iterable[str]) -> None:
    """Log a warning for the weights and LoRAs that A1111 reads in prompts, which are plain text here."""
    found = dict.fromkeys(match[0] for prompt in prompts for match in _OTHER_SYNTAX.finditer(prompt))
    if found:
        log.warning("WARNING: %s in a prompt is plain text: weights are not supported, and LoRAs are set by adapters=",
                    ", ".join(found))  # fmt: skip


def warn_about_options(prompts: Iterable[str]) -> None:
    """Log a warning for options such as ``--n`` in a prompt, which only a prompt file may have."""
    found = dict.fromkeys(match[1] for prompt in prompts for match in _IN_PROMPT.finditer(prompt))
    if found:
        options = ", ".join(found)
        log.warning("WARNING: %s in a prompt is plain text; options are read in a file: prompts_file=FILE", options)


def count_tokens(backbone: Backbone, prompts: Sequence[str]) -> list[int]:
    """Number of tokens of each prompt with start and end token, untruncated, as ``backbone.prompt_limit`` counts."""
    limit = backbone.prompt_limit
    return [len(ids) + limit.special for ids in backbone.token_ids(prompts, limit.encoder)]


def truncated_end(backbone: Backbone, prompt: str) -> str:
    """The end of ``prompt`` that is truncated, decoded by the tokenizer."""
    limit = backbone.prompt_limit
    tokenizer = backbone.tokenizers[list(backbone.encoders).index(limit.encoder)]
    ids = backbone.token_ids([prompt], limit.encoder)[0][limit.tokens - limit.special :]
    tokens = backbone.new_tokens.get(limit.encoder)
    first_id = len(tokenizer) if tokens is None else tokens.first_id
    known = [i for i in ids if i < first_id]
    rows = {i - first_id for i in ids if i not in known}
    names = [] if tokens is None else [token for token in tokens.vector_counts if rows & {*tokens.rows(token)}]
    return " ".join([str(tokenizer.decode(known)).strip(), *names]).strip()


_OPTIONS = {"n": "negative", "w": "width", "h": "height", "d": "seed", "l": "guidance", "s": "steps"}
_KINDS = {"negative": str, "width": int, "height": int, "seed": int, "guidance": float, "steps": int}


def read_prompt_file(path: str) -> list[PromptLine]:
    """Read one prompt per line, with the options of kohya's sample prompts.

    ``--n`` negative prompt, ``--w`` width and ``--h`` height in pixels, ``--d`` seed, ``--s`` steps, ``--l`` guidance.
    Empty lines and lines that begin with ``#`` are ignored.

    Raises:
        UserError: the file is missing or has no prompt, or a line has an unknown or invalid option.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path} is not a file", key="prompts_file")
    lines = []
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", key="prompts_file", remedy="save it as UTF-8") from error
    for number, line in enumerate(content.splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        prompt, *parts = text.split(" --")
        options: dict[str, object] = {}
        for part in parts:
            letter, _, value = part.strip().partition(" ")
            key = _OPTIONS.get(letter)
            if key is None:
                known = ", ".join(f"--{option}" for option in _OPTIONS)
                raise UserError(f"{path}, line {number}: unknown option --{letter}; available: {known}")
            try:
                options[key] = _KINDS[key](value.strip())
            except ValueError as error:
                raise UserError(f"{path}, line {number}: --{letter} {value!r} is not a number") from error
        lines.append(PromptLine(prompt.strip(), **options))  # type: ignore[arg-type]
    if not lines:
        raise UserError(f"{path} contains no prompt", key="prompts_file", remedy="write one prompt per line")
    return lines
