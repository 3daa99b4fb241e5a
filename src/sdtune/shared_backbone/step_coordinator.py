"""Jobs in threads of their own, one of which moves at a time: plain code that waits for the others at its questions.

A job runs as it would alone until it asks for something that all may do at once; when every job has asked, the
questions are answered together. Imports no torch.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any


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
    """A job's place among those that move together, from its first turn to its end."""

    def __init__(self, number: int, job: Callable[[], None]) -> None:
        self.number = number
        self.question: PendingCall | None = None
        self.error: BaseException | None = None
        self.joined = False
        self.ended = False
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(job,), name=f"seat {number}", daemon=True)
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
    """Seats for jobs that move together.

    Args:
        seats: how many; as one job ends, the next takes its place.
        answer: sets the answers of the questions that are given, by seat, and says whose it has answered: others wait
            for the next time, with those who ask the same by then.
    """

    def __init__(self, seats: int, answer: Callable[[dict[int, PendingCall]], Collection[int]]) -> None:
        self.places = range(seats)
        self.broken: BaseException | None = None
        """What kept questions from being answered; where they were asked it is raised, and no further job begins."""
        self._answer = answer
        self._seats: dict[int, Participant] = {}
        self._back = threading.Semaphore(0)

    def ask(self, question: PendingCall) -> Any:
        """From a job's thread: wait for the answer."""
        seat = next(s for s in self._seats.values() if s.thread is threading.current_thread())
        seat.question = question
        self._back.release()
        seat.go.acquire()
        if question.error is not None:
            # A copy: each raise would tie its job's frames, and all that they hold, to the one for all.
            raise copy.copy(question.error)
        return question.answer

    @property
    def here(self) -> int | None:
        """The seat of the job whose thread this is."""
        for number, seat in self._seats.items():
            if seat.thread is threading.current_thread():
                return number
        return None

    def run(self, jobs: Iterator[Callable[[], None]]) -> None:
        """Run all ``jobs``; what one raises ends the others at their next question, and is raised here."""
        failed: BaseException | None = None
        while True:
            for number in self.places:
                while failed is None and not self._ready(number, jobs):
                    failed = self._seats.pop(number).error
            if failed is not None:
                self._end(failed)
            if not self._seats:
                return
            self._reply({n: s.question for n, s in self._seats.items() if s.question is not None})

    def _ready(self, number: int, jobs: Iterator[Callable[[], None]]) -> bool:
        """Move the job at ``number`` on to its next question; False where it ends instead."""
        if number not in self._seats:
            job = next(jobs, None) if self.broken is None else None
            if job is None:
                return True
            self._seats[number] = Participant(number, job)
            self._seats[number].back = self._back
            self._seats[number].thread.start()
        seat = self._seats[number]
        while seat.question is None and not seat.ended:
            seat.go.release()
            self._back.acquire()
            if isinstance(seat.question, JoinCall):
                seat.joined, seat.question = True, None
            elif seat.question is not None and not seat.joined:
                self._reply({number: seat.question})
        return not seat.ended

    def _reply(self, questions: dict[int, PendingCall]) -> None:
        try:
            answered = self._answer(questions)
        except Exception as error:
            # Its frames hold what was asked, and with it the memory of a step.
            self.broken = error.with_traceback(None)
            answered = questions.keys()
            for question in questions.values():
                question.error = self.broken
        for number in answered:
            question, self._seats[number].question = questions[number], None
            if question.joint and question.error is not None:
                self.broken = question.error

    def _end(self, error: BaseException) -> None:
        """Have every job that still waits raise ``error`` where it does."""
        for seat in self._seats.values():
            while not seat.ended:
                if seat.question is not None:
                    seat.question.error, seat.question = error, None
                seat.go.release()
                self._back.acquire()
        self._seats.clear()
        raise error
