"""The command that samples with a trained run."""

from __future__ import annotations

import re
from pathlib import Path

from sdtune.quoting import in_quotes, shell_override, shell_word


def sample_command(run: Path, prompt: str, *more: str) -> str:
    """Shell command that generates an image of ``prompt`` with the model and the artifact of ``run``.

    Args:
        run: run folder.
        prompt: taken literally.
        more: further overrides, quoted for Hydra but not for the shell.
    """
    is_plain = re.fullmatch(r"[\w ,.'!?<>-]+", prompt) is not None and not prompt.startswith("-")
    text = prompt if is_plain else f"prompt={in_quotes(prompt)}"
    return " ".join(["sdtune sample", shell_word(text), shell_override("run", run), *map(shell_word, more)])
