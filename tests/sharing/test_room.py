"""How many at once: each kind of job is measured once, and the largest of each need counts."""

from __future__ import annotations

import pytest
import torch

from sdtune import launch, plan_run
from sdtune.sharing import room

CPU = torch.device("cpu")
FEW = ("method.rank=16", "method.targets=[cross_attention]")
MANY = ("method.rank=4", "method.targets=[cross_attention,self_attention,feed_forward,convolutions]")


def planned(*overrides: str) -> plan_run.Job:
    own = ["method=lora", "backbone=pocket", "hardware=cpu", "data.batch_size=4", *overrides]
    return plan_run.job(launch._compose("plan", launch._search_path(None), own), shared=True)


def test_a_narrow_job_of_many_sites_is_not_taken_for_a_wide_one_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = planned(*FEW), planned(*MANY)
    kept, step, _, base = room._costs(many, CPU)
    monkeypatch.setattr(room, "_free", lambda device, devices: room.ALLOWANCE + base + 12 * (kept + step))
    assert room.room([few] * 30, CPU) > 13
    assert room.room([many] * 30, CPU) == 12
    assert room.room([few, many] * 15, CPU) in (11, 12)


def test_each_kind_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    costs = room._costs
    monkeypatch.setattr(
        room, "_costs", lambda job, device: seen.append(job.config["method"]["rank"]) or costs(job, device)
    )
    grid = [planned(f"method.rank={rank}", f"optimizer.lr={lr}") for rank in (4, 16, 8) for lr in (1e-3, 1e-4)]
    assert room.room(grid, CPU) == 6
    assert seen == [16]


def test_threads_of_a_gpu_have_workspaces() -> None:
    kept, *_ = room._costs(planned(*FEW), CPU)
    assert room._costs(planned(*FEW), torch.device("cuda"))[0] == kept + 32 * 2**20
