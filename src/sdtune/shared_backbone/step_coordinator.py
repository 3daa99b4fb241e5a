"""Cooperative threads: each job runs until it requests a batched call; when all have, the calls run as one batch.

A job runs as it would alone until it asks for something that all may do at once; when every job has asked, the
calls are answered together. Imports no torch.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator
from traceback import format_exception
from typing import Any

from sdtune.errors import RunFailed


class PendingCall:
    """What a job waits for; a subclass says what it is. Answered by setting ``answer`` or ``error``."""

    answer: Any = None
    error: BaseException | None = None

    @property
    def joint(self) -> bool:
        """Whether it is a step that all take: what keeps it from being answered would keep the next job's as well."""
        return False


class JoinCall(PendingCall):
    """From here on the job waits for the others; what it asked before was answered at once."""


class Participant:
    """A job that runs together with others, from its start to its end."""

    def __init__(self, number: int, job: Callable[[], None]) -> None:
        self.number = number
        self.call: PendingCall | None = None
        self.error: BaseException | None = None
        self.joined = False
        self.ended = False
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(job,), name=f"run {number}", daemon=True)
        self.back: threading.Semaphore

    def _run(self, job: Callable[[], None]) -> None:
        self.go.acquire()
        try:
            job()
        except BaseException as error:
            self.error = error
        finally:
            self.ended = True
            self.back.release()


class StepCoordinator:
    """Runs jobs together, each a :class:`Participant`.

    Args:
        size: how many jobs run together; when one ends, the next takes its number.
        answer: sets the answers of the calls that it gets, by participant's number, and returns the numbers that it
            answered; the others wait for the next time, together with calls of the same kind.
    """

    def __init__(self, size: int, answer: Callable[[dict[int, PendingCall]], Collection[int]]) -> None:
        self.places = range(size)
        self.broken: BaseException | None = None
        """What kept calls from being answered; where they were asked it is raised, and no further job begins."""
        self._answer = answer
        self._participants: dict[int, Participant] = {}
        self._back = threading.Semaphore(0)

    def ask(self, call: PendingCall) -> Any:
        """From a job's thread: wait for the answer."""
        participant = next(s for s in self._participants.values() if s.thread is threading.current_thread())
        participant.call = call
        self._back.release()
        participant.go.acquire()
        if call.error is not None:
            # A copy: each raise would tie its job's frames, and all that they hold, to the one for all.
            raise copy.copy(call.error)
        return call.answer

    @property
    def here(self) -> int | None:
        """The number of the participant whose thread this is; None in any other thread."""
        for number, participant in self._participants.items():
            if participant.thread is threading.current_thread():
                return number
        return None

    def run(self, jobs: Iterator[Callable[[], None]]) -> None:
        """Run all ``jobs``; what one raises ends the others at their next call, and is raised here."""
        failed: BaseException | None = None
        while True:
            for number in self.places:
                while failed is None and not self._ready(number, jobs):
                    failed = self._participants.pop(number).error
            if failed is not None:
                self._end(failed)
            if not self._participants:
                return
            self._reply({n: s.call for n, s in self._participants.items() if s.call is not None})

    def _ready(self, number: int, jobs: Iterator[Callable[[], None]]) -> bool:
        """Move the job at ``number`` on to its next call; False where it ends instead."""
        if number not in self._participants:
            job = next(jobs, None) if self.broken is None else None
            if job is None:
                return True
            self._participants[number] = Participant(number, job)
            self._participants[number].back = self._back
            self._participants[number].thread.start()
        participant = self._participants[number]
        while participant.call is None and not participant.ended:
            participant.go.release()
            self._back.acquire()
            if isinstance(participant.call, JoinCall):
                participant.joined, participant.call = True, None
            elif participant.call is not None and not participant.joined:
                self._reply({number: participant.call})
        return not participant.ended

    def _reply(self, calls: dict[int, PendingCall]) -> None:
        try:
            answered = self._answer(calls)
        except Exception as error:
            # A traceback's frames hold what was asked, and with it the memory of a step; its text does not.
            details = "".join(format_exception(error))
            self.broken = RunFailed(f"{type(error).__name__}: {error}", details=details)
            answered = calls.keys()
            for call in calls.values():
                call.error = self.broken
        for number in answered:
            call, self._participants[number].call = calls[number], None
            if call.joint and call.error is not None:
                self.broken = call.error

    def _end(self, error: BaseException) -> None:
        """Have every job that still waits raise ``error`` where it does."""
        for participant in self._participants.values():
            while not participant.ended:
                if participant.call is not None:
                    participant.call.error, participant.call = error, None
                participant.go.release()
                self._back.acquire()
        self._participants.clear()
        raise error
