"""Memory that ``sdtune plan`` counts for the trainings of the check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.gpu.configurations import Plan, planned_settings
from sdtune.commands.plan import CheckedPlan, checked_plan, configured_switches, plan_request
from sdtune.config.compose import compose, search_path
from sdtune.files import write_json
from sdtune.planning.memory import ALLOWANCE, GIB, memory
from sdtune.planning.request import count


def write_plans(work: Path, file: Path, first: int, stride: int) -> None:
    """Write the plan of every ``stride``-th training, from number ``first`` on, by name."""
    settings = list(planned_settings(work).items())[first::stride]
    write_json(file, {name: planned(overrides) for name, overrides in settings})


def planned(settings: Sequence[str]) -> Plan:
    """What ``sdtune plan`` counts for the ``settings`` of a training on one GPU."""
    job = checked(settings)
    counted = memory(count(plan_request(job)), configured_switches(job), job.accumulation, 1)
    return {"step": counted.step / GIB, "peak": counted.peak / GIB, "fits": (counted.least + ALLOWANCE) / GIB}


def checked(settings: Sequence[str]) -> CheckedPlan:
    """The checked ``settings``, with the configs that sdtune includes: the files of the backbone may not exist yet."""
    included = [setting for setting in settings if not setting.startswith("backbone.path=")]
    return checked_plan(compose("plan", search_path(None), included))
