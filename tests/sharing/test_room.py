"""How many at once: counted of a job that has all that any of them has."""

from __future__ import annotations

import pytest
import torch

from sdtune import launch, plan_run
from sdtune.sharing import room

CPU = torch.device("cpu")
EMA = "callbacks.ema={_target_:sdtune.callbacks.EMA,decay:0.9}"


def planned(*overrides: str) -> plan_run.Job:
    own = ["method=lora", "backbone=pocket", "hardware=cpu", "data.batch_size=4", "data=folder", *overrides]
    return plan_run.job(launch._compose("plan", launch._search_path(None), own), shared=True)


def costs(*jobs: plan_run.Job) -> tuple[int, ...]:
    return room._costs(room._largest(jobs, jobs[0].config["optimizer"]), CPU)


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
    monkeypatch.setattr(room, "_free", lambda device, devices: room.ALLOWANCE + base + 12 * (kept + step))
    assert room.room(jobs, CPU) == 12
    assert room.room(jobs[:5], CPU) == 5
    monkeypatch.setattr(room, "_free", lambda device, devices: base)
    assert room.room(jobs, CPU) == 1


def test_each_optimizer_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    own = room._costs

    def counted(job: plan_run.Job, device: torch.device) -> tuple[int, int, int, int]:
        seen.append(job.config["optimizer"]["_target_"].rpartition(".")[2])
        return own(job, device)

    monkeypatch.setattr(room, "_costs", counted)
    each = [("adamw", 1e-3), ("adamw", 1e-4), ("prodigy", 1.0)]
    jobs = [planned(f"optimizer={name}", f"optimizer.lr={lr}") for name, lr in each]
    room.room(jobs, CPU)
    assert seen == ["AdamW", "Prodigy"]


def test_words_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [planned("method=textual_inversion", f'new_tokens=[{{token: "<{name}>", init: a}}]') for name in "ab"]
    kept, step, *_ = costs(*words)
    assert 0 < kept < step


def test_threads_of_a_gpu_have_workspaces() -> None:
    job = planned()
    assert room._costs(job, torch.device("cuda"))[0] == room._costs(job, CPU)[0] + 32 * 2**20
