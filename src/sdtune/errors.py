"""Exceptions by which a command ends, and the texts that they share."""

from __future__ import annotations

RESUMES = "sdtune train resume=RUN goes on from the last checkpoint"
"""What is said to a user whose training is stopped from outside."""

STOPPED = f"stopped; {RESUMES}, if there is one"
"""The whole line, where it is not known whether there is a checkpoint."""


class UserError(ValueError):
    """Bad input that the user can mend; the command line shows it as one line and exits with code 2.

    Any other ``ValueError`` is a bug of sdtune or of a library, and is shown with its traceback.

    Args:
        message: what is wrong.
        key: the setting that is wrong, as a dotted config key; None where it is no setting.
        remedy: what would be right; None where the message says it, or where it is not known.

    ``str()`` is ``KEY: MESSAGE; REMEDY``.
    """

    def __init__(self, message: str, *, key: str | None = None, remedy: str | None = None) -> None:
        self.key, self.remedy = key, remedy
        super().__init__(f"{f'{key}: ' if key else ''}{message}{f'; {remedy}' if remedy else ''}")


class Stopped(Exception):
    """A run that was asked to stop and has saved; ``code`` is the exit code (128 + the signal's number)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class RunFailed(Exception):
    """A run that ended by itself, with a reason that is the user's to mend; what it had saved is kept.

    Args:
        message: one line.
        agreed: all processes of the run know it, and only the first one shows it.
        details: a traceback as text, where it is of another process or thread.
    """

    def __init__(self, message: str, agreed: bool = False, details: str | None = None) -> None:
        super().__init__(message)
        self.agreed, self.details = agreed, details


PRUNED = 4
"""Exit code of a job in a process of its own that was pruned."""


class Pruned(Exception):
    """A sweep's run that fell behind the others and was ended at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"pruned at step {step}")
        self.step = step
