"""Step coordinator: which jobs wait, which calls are answered together, how the end of a job affects the others."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest

from sdtune.errors import RunFailed
from sdtune.shared_backbone.step_coordinator import JoinCall, PendingCall, StepCoordinator


class Number(PendingCall):
    def __init__(self, value: int) -> None:
        self.value = value


def run(size: int, jobs: list[Callable[[StepCoordinator], None]]) -> list[dict[int, int]]:
    """Run ``jobs``; return the values of each batch of calls by participant number; answers are 100 larger."""
    batches: list[dict[int, int]] = []

    def answer(calls: dict[int, PendingCall]) -> Collection[int]:
        numbers = {number: call for number, call in calls.items() if isinstance(call, Number)}
        if numbers:
            batches.append({number: call.value for number, call in numbers.items()})
        for call in numbers.values():
            call.answer = call.value + 100
        return numbers

    coordinator = StepCoordinator(size, answer)
    coordinator.run(lambda job=job: job(coordinator) for job in jobs)
    return batches


def calling_job(*values: int, joins: bool = True) -> Callable[[StepCoordinator], None]:
    def job(coordinator: StepCoordinator) -> None:
        if joins:
            coordinator.request(JoinCall())
        for value in values:
            assert coordinator.request(Number(value)) == value + 100

    return job


def test_calls_of_all_jobs_are_answered_together() -> None:
    assert run(2, [calling_job(1, 2), calling_job(10, 20)]) == [{0: 1, 1: 10}, {0: 2, 1: 20}]


def test_job_does_not_wait_before_it_has_joined() -> None:
    assert run(2, [calling_job(1, joins=False), calling_job(10), calling_job(20)]) == [{0: 1}, {0: 10, 1: 20}]


def test_next_job_takes_the_number_of_an_ended_one() -> None:
    assert run(2, [calling_job(1), calling_job(10, 20, 30), calling_job(5, 6)]) == [
        {0: 1, 1: 10},
        {1: 20, 0: 5},
        {0: 6, 1: 30},
    ]


def test_unanswered_call_waits_for_the_next_round() -> None:
    batches: list[list[int]] = []

    def answer(calls: dict[int, PendingCall]) -> Collection[int]:
        numbers = {number: call for number, call in calls.items() if isinstance(call, Number)}
        answered = {number for number, call in numbers.items() if call.value < 10} or set(numbers)
        batches.append(sorted(numbers[number].value for number in answered))
        for number in answered:
            numbers[number].answer = numbers[number].value + 100
        return answered

    coordinator = StepCoordinator(2, answer)
    coordinator.run(lambda job=job: job(coordinator) for job in [calling_job(1, 11), calling_job(12)])
    assert batches == [[1], [11, 12]]


def test_failed_answer_is_raised_in_the_waiting_jobs_and_no_new_job_starts() -> None:
    ended: list[str] = []
    started: list[int] = []

    def answer(calls: dict[int, PendingCall]) -> Collection[int]:
        raise RuntimeError("no room")

    def job(number: int) -> None:
        started.append(number)
        try:
            coordinator.request(JoinCall())
            coordinator.request(Number(number))
        except RunFailed as error:
            ended.append(str(error))

    coordinator = StepCoordinator(2, answer)
    coordinator.run(lambda number=number: job(number) for number in range(4))
    assert started == [0, 1]
    assert ended == ["RuntimeError: no room", "RuntimeError: no room"]
    assert isinstance(coordinator.error, RunFailed)
    assert "in answer" in str(coordinator.error.details), "the traceback is stored"


def test_exception_of_a_job_ends_the_waiting_jobs() -> None:
    ended: list[str] = []

    def fails(coordinator: StepCoordinator) -> None:
        coordinator.request(JoinCall())
        coordinator.request(Number(1))
        raise RuntimeError("over")

    def waits(coordinator: StepCoordinator) -> None:
        try:
            calling_job(10, 20, 30)(coordinator)
        except RuntimeError as error:
            ended.append(str(error))
            raise

    with pytest.raises(RuntimeError, match="over"):
        run(2, [waits, fails])
    assert ended == ["over"]
