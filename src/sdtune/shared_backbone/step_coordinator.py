"""Cooperative threads: each job runs until it requests a batched call; when all have, the calls run as one batch.

Only one thread runs at a time. Calls of a job that has not joined the others yet are answered immediately. Imports no
torch.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator
from traceback import format_exception
from typing import Any

from sdtune.errors import RunFailed


class PendingCall:
    """Base class of calls that a job waits for; to answer a call, set ``answer`` or ``error``."""

    answer: Any = None
    error: BaseException | None = None

    @property
    def joint(self) -> bool:
        """Whether the call is part of a step of all jobs; if it fails, no new job starts: it would fail as well."""
        return False


class JoinCall(PendingCall):
    """Joins the job to the others: its later calls wait for theirs; earlier calls are answered immediately."""


class Participant:
    """Thread of one job and its pending call."""

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
    """Runs jobs together, each in a :class:`Participant`.

    Args:
        size: number of concurrent jobs; when one ends, the next job takes its number.
        answer: sets the answers of the pending calls, which it receives by participant number, and returns the
            answered numbers. The other calls wait for the next round, to be batched with calls of the same kind.
    """

    def __init__(self, size: int, answer: Callable[[dict[int, PendingCall]], Collection[int]]) -> None:
        self.numbers = range(size)
        self.error: BaseException | None = None
        """Error of calls that could not be answered; the jobs that wait for them raise it, and no new job starts."""
        self._answer = answer
        self._participants: dict[int, Participant] = {}
        self._back = threading.Semaphore(0)

    def request(self, call: PendingCall) -> Any:
        """Wait for the answer of ``call`` and return it; called in a job's thread."""
        participant = next(p for p in self._participants.values() if p.thread is threading.current_thread())
        participant.call = call
        self._back.release()
        participant.go.acquire()
        if call.error is not None:
            # Raise a copy: one exception for all would collect the frames of all jobs, and so keep their memory.
            raise copy.copy(call.error)
        return call.answer

    @property
    def current_number(self) -> int | None:
        """Number of the participant that runs in the current thread; None in other threads."""
        for number, participant in self._participants.items():
            if participant.thread is threading.current_thread():
                return number
        return None

    def run(self, jobs: Iterator[Callable[[], None]]) -> None:
        """Run all ``jobs``; an exception of one job ends the others at their next call and is raised here."""
        failed: BaseException | None = None
        while True:
            for number in self.numbers:
                while failed is None and not self._advance(number, jobs):
                    failed = self._participants.pop(number).error
            if failed is not None:
                self._end(failed)
            if not self._participants:
                return
            self._reply({n: p.call for n, p in self._participants.items() if p.call is not None})

    def _advance(self, number: int, jobs: Iterator[Callable[[], None]]) -> bool:
        """Run the job ``number`` until its next call; return False if it ends instead."""
        if number not in self._participants:
            job = next(jobs, None) if self.error is None else None
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
            # Traceback as text: its frames would keep the calls, and so the memory of a step.
            details = "".join(format_exception(error))
            self.error = RunFailed(f"{type(error).__name__}: {error}", details=details)
            answered = calls.keys()
            for call in calls.values():
                call.error = self.error
        for number in answered:
            call, self._participants[number].call = calls[number], None
            if call.joint and call.error is not None:
                self.error = call.error

    def _end(self, error: BaseException) -> None:
        """Raise ``error`` in every job that still waits, then here."""
        for participant in self._participants.values():
            while not participant.ended:
                if participant.call is not None:
                    participant.call.error, participant.call = error, None
                participant.go.release()
                self._back.acquire()
        self._participants.clear()
        raise error
