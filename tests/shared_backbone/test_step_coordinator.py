"""Jobs that move by turns: who waits for whom, what comes back, and how one's end leaves the others."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest

from sdtune.errors import RunFailed
from sdtune.shared_backbone.step_coordinator import JoinCall, PendingCall, StepCoordinator


class Number(PendingCall):
    def __init__(self, value: int) -> None:
        self.value = value


def run(seats: int, jobs: list[Callable[[StepCoordinator], None]]) -> list[dict[int, int]]:
    """The questions that were answered together, by seat; each answer is a hundred more."""
    asked: list[dict[int, int]] = []

    def answer(questions: dict[int, PendingCall]) -> Collection[int]:
        numbers = {seat: q for seat, q in questions.items() if isinstance(q, Number)}
        if numbers:
            asked.append({seat: q.value for seat, q in numbers.items()})
        for question in numbers.values():
            question.answer = question.value + 100
        return numbers

    coordinator = StepCoordinator(seats, answer)
    coordinator.run(lambda job=job: job(coordinator) for job in jobs)
    return asked


def asks(*values: int, joins: bool = True) -> Callable[[StepCoordinator], None]:
    def job(coordinator: StepCoordinator) -> None:
        if joins:
            coordinator.ask(JoinCall())
        for value in values:
            assert coordinator.ask(Number(value)) == value + 100

    return job


def test_what_all_ask_is_answered_together() -> None:
    assert run(2, [asks(1, 2), asks(10, 20)]) == [{0: 1, 1: 10}, {0: 2, 1: 20}]


def test_before_it_has_joined_a_job_waits_for_none() -> None:
    assert run(2, [asks(1, joins=False), asks(10), asks(20)]) == [{0: 1}, {0: 10, 1: 20}]


def test_the_next_job_takes_the_place_of_one_that_ends() -> None:
    assert run(2, [asks(1), asks(10, 20, 30), asks(5, 6)]) == [{0: 1, 1: 10}, {1: 20, 0: 5}, {0: 6, 1: 30}]


def test_what_is_not_answered_waits_for_the_next_time() -> None:
    asked: list[list[int]] = []

    def answer(questions: dict[int, PendingCall]) -> Collection[int]:
        numbers = {seat: q for seat, q in questions.items() if isinstance(q, Number)}
        first = {seat for seat, q in numbers.items() if q.value < 10} or set(numbers)
        asked.append(sorted(numbers[seat].value for seat in first))
        for seat in first:
            numbers[seat].answer = numbers[seat].value + 100
        return first

    coordinator = StepCoordinator(2, answer)
    coordinator.run(lambda job=job: job(coordinator) for job in [asks(1, 11), asks(12)])
    assert asked == [[1], [11, 12]]


def test_what_cannot_be_answered_is_raised_where_it_was_asked_and_no_job_begins_any_more() -> None:
    ended: list[str] = []
    begun: list[int] = []

    def answer(questions: dict[int, PendingCall]) -> Collection[int]:
        raise RuntimeError("no room")

    def job(number: int) -> None:
        begun.append(number)
        try:
            coordinator.ask(JoinCall())
            coordinator.ask(Number(number))
        except RunFailed as error:
            ended.append(str(error))

    coordinator = StepCoordinator(2, answer)
    coordinator.run(lambda number=number: job(number) for number in range(4))
    assert begun == [0, 1]
    assert ended == ["RuntimeError: no room", "RuntimeError: no room"]
    assert isinstance(coordinator.broken, RunFailed)
    assert "in answer" in str(coordinator.broken.details), "the traceback of a bug is kept"


def test_what_a_job_raises_ends_the_others_where_they_wait() -> None:
    ended: list[str] = []

    def fails(coordinator: StepCoordinator) -> None:
        coordinator.ask(JoinCall())
        coordinator.ask(Number(1))
        raise RuntimeError("over")

    def waits(coordinator: StepCoordinator) -> None:
        try:
            asks(10, 20, 30)(coordinator)
        except RuntimeError as error:
            ended.append(str(error))
            raise

    with pytest.raises(RuntimeError, match="over"):
        run(2, [waits, fails])
    assert ended == ["over"]
