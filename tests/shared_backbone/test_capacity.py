"""Number of runs that fit, from the costs of a job with the most expensive settings of all jobs."""

from __future__ import annotations

import pytest
import torch
from omegaconf import DictConfig

from sdtune.config.compose import compose, search_path
from sdtune.shared_backbone import capacity
from sdtune.sweeps.shared_group import plan_requests as requests

CPU = torch.device("cpu")
EMA = "callbacks.ema={_target_:sdtune.callbacks.EMA,decay:0.9}"


def planned(*overrides: str) -> DictConfig:
    settings = ["method=lora", "backbone=pocket", "hardware=cpu", "data.batch_size=4", "data=folder", *overrides]
    return compose("plan", search_path(None), settings)


def costs(*jobs: DictConfig) -> tuple[int, ...]:
    [request] = requests(jobs)
    return capacity.run_costs(request, CPU)


@pytest.mark.slow
def test_costs_include_the_most_expensive_setting_of_every_job() -> None:
    jobs = [
        planned("method.rank=16", "method.targets=[cross_attention]"),
        planned("method.rank=4", "method.targets=[feed_forward]", "method.dropout=0.1"),
        planned("method.rank=2", "method.targets=[convolutions]", "data.cache_text=false", EMA),
        planned("method.blocks={denoiser.mid_block: {rank: 24}}"),
    ]
    all_targets = "method.targets=[cross_attention,self_attention,feed_forward,convolutions]"
    all_settings = planned("method.rank=24", all_targets, "method.dropout=0.1", "data.cache_text=false", EMA)
    group, separate = costs(*jobs), [costs(job) for job in jobs]
    assert group == costs(all_settings)
    assert all(group_cost >= cost for each in separate for group_cost, cost in zip(group, each, strict=True))
    assert group[1] > max(step for _, step, *_ in separate)


@pytest.mark.slow
def test_as_many_runs_fit_as_the_free_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [planned(f"method.rank={rank}") for rank in (4, 16)] * 10
    all_requests, few_requests = requests(jobs), requests(jobs[:5])
    permanent, step, previews, base = capacity.run_costs(all_requests[0], CPU)
    assert 12 * (permanent + step) > previews + 12 * permanent
    monkeypatch.setattr(
        capacity, "free_memory", lambda device, devices: capacity.ALLOWANCE + base + 12 * (permanent + step)
    )
    assert capacity.runs_that_fit(all_requests, 20, CPU) == 12
    assert capacity.runs_that_fit(few_requests, 5, CPU) == 5
    monkeypatch.setattr(capacity, "free_memory", lambda device, devices: base)
    assert capacity.runs_that_fit(all_requests, 20, CPU) == 1


def test_each_optimizer_has_one_plan_request() -> None:
    settings = [("adamw", 1e-3), ("adamw", 1e-4), ("prodigy", 1.0)]
    plan_requests = requests([planned(f"optimizer={name}", f"optimizer.lr={lr}") for name, lr in settings])
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    optimizers = [request.make_adapter().make_optimizer(groups) for request in plan_requests]
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW", "Prodigy"]


def test_new_tokens_have_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [planned("method=textual_inversion", f'new_tokens=[{{token: "<{name}>", init: a}}]') for name in "ab"]
    permanent, step, *_ = costs(*jobs)
    assert 0 < permanent < step


@pytest.mark.slow
def test_costs_on_a_gpu_include_a_cublas_workspace() -> None:
    [request] = requests([planned()])
    on_gpu, on_cpu = (capacity.run_costs(request, torch.device(kind))[0] for kind in ("cuda", "cpu"))
    assert on_gpu == on_cpu + 32 * 2**20
