"""Exceptions by which a run ends, and the texts that they share."""

from __future__ import annotations

RESUMES = "sdtune train resume=RUN goes on from the last checkpoint"
"""What is said to a user whose training is stopped from outside."""

STOPPED = f"stopped; {RESUMES}, if there is one"
"""The whole line, where it is not known whether there is a checkpoint."""


class Stopped(Exception):
    """A run that was asked to stop and has saved; ``code`` is the exit code (128 + the signal's number)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class RunFailed(Exception):
    """A run that ended by itself, with a reason that is the user's to mend; what it had saved is kept.

    ``agreed``: all of its processes know, and the first one speaks for them.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


PRUNED = 4
"""Exit code of a job in a process of its own that was pruned."""


class Pruned(Exception):
    """A sweep's run that fell behind the others and was ended at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"pruned at step {step}")
        self.step = step
