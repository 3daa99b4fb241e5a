"""Learning rate schedules against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sdtune.lr_schedule import Constant, Cosine, LRSchedule, Polynomial


def test_constant_schedule_is_one() -> None:
    assert {Constant()(step, 50) for step in range(51)} == {1.0}


def test_cosine_falls_from_one_to_its_floor() -> None:
    for floor in (0.0, 0.1):
        schedule = Cosine(floor=floor)
        for step in range(101):
            expected = floor + (1 - floor) * (1 + math.cos(math.pi * step / 100)) / 2
            assert schedule(step, 100) == pytest.approx(expected, abs=1e-12)
        assert schedule(0, 100) == 1
        assert schedule(50, 100) == pytest.approx((1 + floor) / 2)
        assert schedule(100, 100) == pytest.approx(floor)


@pytest.mark.parametrize("schedule", [Constant(4), Cosine(4), Polynomial(4)])
def test_warmup_is_linear_and_no_step_has_rate_zero(schedule: LRSchedule) -> None:
    assert [schedule(step, 100) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(("total", "steps"), [(5, 0), (9, 0), (10, 1), (300, 30), (1000, 100), (5000, 100)])
def test_warmup_is_at_most_a_tenth_of_the_run(total: int, steps: int) -> None:
    schedule = Constant(100)
    assert sum(schedule(step, total) < 1 for step in range(total)) == steps


def test_cosine_starts_after_warmup() -> None:
    schedule = Cosine(100)
    assert schedule(100, 1000) == 1
    assert schedule(550, 1000) == pytest.approx(0.5)
    assert all(schedule(step, 1000) > schedule(step + 1, 1000) for step in range(100, 999))


def test_schedule_stays_at_the_floor_after_the_last_step() -> None:
    assert Cosine(floor=0.25)(150, 100) == pytest.approx(0.25)


def test_every_step_of_a_run_has_a_positive_rate() -> None:
    for total in (1, 2, 11, 100):
        assert all(0 < Cosine(100)(step, total) <= 1 for step in range(total))


def test_schedule_multiplies_the_learning_rate_of_the_optimizer() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Cosine(2, floor=0.5)(step, 20))
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3])
    assert rates[11] == pytest.approx(2e-3 * 0.75)


@pytest.mark.parametrize(("power", "floor"), [(1.0, 0.0), (2.0, 0.1)])
def test_polynomial_falls_from_one_to_its_floor(power: float, floor: float) -> None:
    schedule = Polynomial(power=power, floor=floor)
    for step in range(101):
        assert schedule(step, 100) == pytest.approx(floor + (1 - floor) * (1 - step / 100) ** power, abs=1e-12)
