"""How many at once: counted of a job that has all that any of them has."""

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
    own = ["method=lora", "backbone=pocket", "hardware=cpu", "data.batch_size=4", "data=folder", *overrides]
    return compose("plan", search_path(None), own)


def costs(*jobs: DictConfig) -> tuple[int, ...]:
    [request] = requests(jobs)
    return capacity.run_costs(request, CPU)


def test_it_has_every_site_at_the_largest_rank_and_whatever_else_one_has() -> None:
    each = [
        planned("method.rank=16", "method.targets=[cross_attention]"),
        planned("method.rank=4", "method.targets=[feed_forward]", "method.dropout=0.1"),
        planned("method.rank=2", "method.targets=[convolutions]", "data.cache_text=false", EMA),
        planned("method.blocks={unet.mid_block: {rank: 24}}"),
    ]
    sites = "method.targets=[cross_attention,self_attention,feed_forward,convolutions]"
    assert costs(*each) == costs(planned("method.rank=24", sites, "method.dropout=0.1", "data.cache_text=false", EMA))
    assert all(all(whole >= own for whole, own in zip(costs(*each), costs(one), strict=True)) for one in each)
    assert costs(*each)[1] > max(costs(one)[1] for one in each)


def test_so_many_as_fit_beside_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [planned(f"method.rank={rank}") for rank in (4, 16)] * 10
    kept, step, previews, base = costs(*jobs)
    assert 12 * (kept + step) > previews + 12 * kept
    monkeypatch.setattr(capacity, "free_memory", lambda device, devices: capacity.ALLOWANCE + base + 12 * (kept + step))
    assert capacity.room(requests(jobs), 20, CPU) == 12
    assert capacity.room(requests(jobs[:5]), 5, CPU) == 5
    monkeypatch.setattr(capacity, "free_memory", lambda device, devices: base)
    assert capacity.room(requests(jobs), 20, CPU) == 1


def test_each_optimizer_is_measured_once() -> None:
    each = [("adamw", 1e-3), ("adamw", 1e-4), ("prodigy", 1.0)]
    found = requests([planned(f"optimizer={name}", f"optimizer.lr={lr}") for name, lr in each])
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    optimizers = [request.make_adapter().make_optimizer(groups) for request in found]
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW", "Prodigy"]


def test_words_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [planned("method=textual_inversion", f'new_tokens=[{{token: "<{name}>", init: a}}]') for name in "ab"]
    kept, step, *_ = costs(*words)
    assert 0 < kept < step


def test_threads_of_a_gpu_have_workspaces() -> None:
    [request] = requests([planned()])
    on_gpu, on_cpu = (capacity.run_costs(request, torch.device(kind))[0] for kind in ("cuda", "cpu"))
    assert on_gpu == on_cpu + 32 * 2**20
