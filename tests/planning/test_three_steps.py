"""The memory of a real training step after two others is what ``sdtune plan`` counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from method_cases import METHODS, Case
from running import ThirdStep, arguments, train
from sdtune.commands.plan import checked_plan, plan_request
from sdtune.config.compose import compose, search_path
from sdtune.planning.request import count


@pytest.mark.parametrize("case", [Case(name) for name in METHODS], ids=str)
def test_peak_of_the_third_step_is_the_planned_peak(case: Case, tiny: Path, images: Path, tmp_path: Path) -> None:
    overrides = [a for a in arguments(tiny, images, tmp_path / "run") if not a.startswith("method")]
    overrides += [*case.command(tiny, images), "data.batch_size=2", "data.resolution=32"]
    costs = count(plan_request(checked_plan(compose("plan", search_path(None), overrides))))
    meter = ["trust=[running]", "+callbacks.meter._target_=running.ThirdStep"]
    assert train(*overrides, *meter, "trainer.max_steps=3") == 0
    assert ThirdStep.gradients_before == 0
    assert ThirdStep.peak == pytest.approx(costs.plain.together, rel=0.05)
