"""Exceptions that end a command, and texts and checks that several modules use."""

from __future__ import annotations

RESUME_ADVICE = "continue it with: sdtune train resume=RUN"
"""How to continue a training that was stopped by a signal."""

STOPPED = f"stopped; if there is a checkpoint, {RESUME_ADVICE}"
"""The complete line, for the case that it is unknown whether a checkpoint exists."""


class UserError(ValueError):
    """Invalid input that the user can fix; the command line prints it as one line and exits with code 2.

    Any other ``ValueError`` is a bug in sdtune or in a library and is printed with its traceback.

    Args:
        message: what is wrong.
        key: dotted config key of the invalid setting; None if the error is not about a setting.
        remedy: how to fix it; None if the message states it or it is unknown.

    ``str()`` is ``KEY: MESSAGE; REMEDY``.
    """

    def __init__(self, message: str, *, key: str | None = None, remedy: str | None = None) -> None:
        self.message, self.key, self.remedy = message, key, remedy
        super().__init__(f"{f'{key}: ' if key else ''}{message}{f'; {remedy}' if remedy else ''}")


class Stopped(Exception):
    """A run stopped on request, after saving; ``code`` is the exit code (128 + signal number)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class RunFailed(Exception):
    """A run failed for a reason that the user can fix; its saved files remain.

    Args:
        message: one line.
        agreed: True if all processes of the run raise it; then only rank 0 prints it.
        details: traceback as text, if the error occurred in another process or thread.
    """

    def __init__(self, message: str, agreed: bool = False, details: str | None = None) -> None:
        super().__init__(message)
        self.agreed, self.details = agreed, details


PRUNED = 4
"""Exit code of a pruned job that runs in a separate process."""


class Pruned(Exception):
    """A run of a sweep was pruned at ``step`` because its metric was worse than that of other runs."""

    def __init__(self, step: int) -> None:
        super().__init__(f"pruned at step {step}")
        self.step = step


def check_multiple(side: int, factor: int, key: str) -> None:
    """Raise UserError if ``side`` in pixels, set by ``key``, is not a multiple of the VAE's downscaling ``factor``."""
    if side % factor:
        raise UserError(
            f"{side} is not a multiple of {factor}, the downscaling factor of the VAE",
            key=key,
            remedy=f"set {max(1, round(side / factor)) * factor}",
        )
