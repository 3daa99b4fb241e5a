"""Prodigy without waits makes the steps of prodigyopt."""

from __future__ import annotations

import copy
from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn

from sdtune.training.prodigy import Prodigy

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "as configured": {
        "betas": (0.9, 0.99),
        "weight_decay": 1e-2,
        "use_bias_correction": True,
        "safeguard_warmup": True,
    },
    "coupled decay": {"weight_decay": 1e-2, "decouple": False},
    "no first moment": {"betas": (0.0, 0.99)},
    "slices and growth": {"slice_p": 3, "growth_rate": 1.5, "d_coef": 0.5, "beta3": 0.9},
}


def trained(kind: Any, settings: dict[str, Any], steps: int, reload_at: int = -1) -> tuple[list[torch.Tensor], float]:
    """Parameters and estimate after ``steps``; a pair with zeros, as of a LoRA, and a bias without gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False)).double()
    nn.init.zeros_(model[1].weight)
    model[0].bias.requires_grad_(False)
    groups = [{"params": [model[0].weight]}, {"params": [model[1].weight, model[0].bias]}]
    optimizer = kind(groups, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    x, y = torch.randn(8, 6).double(), torch.randn(8, 3).double()
    for step in range(steps):
        if step == reload_at:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = kind(groups, **settings)
            optimizer.load_state_dict(saved)
            schedule.optimizer = optimizer
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    return [p.detach().clone() for p in model.parameters()], float(optimizer.param_groups[0]["d"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_those_of_prodigyopt(variant: str) -> None:
    reference, expected = trained(prodigyopt.Prodigy, VARIANTS[variant], 40)
    parameters, d = trained(Prodigy, VARIANTS[variant], 40)
    assert d == pytest.approx(expected, rel=1e-6)
    assert d > 2e-6  # the estimate has grown
    for one, other in zip(parameters, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def test_state_can_be_saved_and_loaded() -> None:
    whole, d = trained(Prodigy, VARIANTS["as configured"], 20)
    resumed, again = trained(Prodigy, VARIANTS["as configured"], 20, reload_at=10)
    assert d == again
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_without_gradients_nothing_moves() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = Prodigy([weight], weight_decay=0.1)
    optimizer.step()
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    assert torch.isfinite(torch.as_tensor(optimizer.param_groups[0]["d"]))


def test_step_reads_no_number_from_the_device() -> None:
    """Only the first step asks whether a parameter is zero."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = Prodigy([weight])
    weight.grad = torch.ones(3)
    optimizer.step()

    def refuse(self: torch.Tensor) -> Any:
        raise AssertionError("reads a value")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "__bool__", "__float__"):
            patch.setattr(torch.Tensor, name, refuse)
        optimizer.step()
