"""A non-finite step does not change the weights, and ends the run with an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from running import arguments, rows, train
from sdtune.training.nonfinite_guard import skip_if_not_finite


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, value: float) -> torch.Tensor:
    """Make one guarded step with ``value`` in a gradient; returns the flag that the step is finite."""
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)
    parameters[1].grad[0] = value
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    finite = skip_if_not_finite(optimizer, parameters, norm)
    optimizer.step()
    return finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_step_leaves_fused_adamw_unchanged_bit_for_bit(bad: float) -> None:
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    assert step(parameters, optimizer, 0.5)
    weights = [p.detach().clone() for p in parameters]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    assert not step(parameters, optimizer, bad)
    for p, weight, saved in zip(parameters, weights, state, strict=True):
        assert torch.equal(p, weight)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in saved.items())
    assert step(parameters, optimizer, 0.5)  # the next finite step changes the weights again
    assert all(not torch.equal(p, weight) for p, weight in zip(parameters, weights, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_step_leaves_sgd_unchanged(bad: float) -> None:
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    weights = [p.detach().clone() for p in parameters]
    assert not step(parameters, optimizer, bad)
    assert all(torch.equal(p, weight) for p, weight in zip(parameters, weights, strict=True))
    assert step(parameters, optimizer, 0.5)
    assert all(not torch.equal(p, weight) for p, weight in zip(parameters, weights, strict=True))


def test_nonfinite_run_stops_at_the_next_flush_and_keeps_the_last_finite_checkpoint(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code = train(
        *arguments(tiny, images, run, "trainer.max_steps=20", "trainer.log_every_n_steps=4"),
        "checkpoint.every_steps=3",
        "+callbacks.poison._target_=running.Poison",
        "+callbacks.poison.step=5",
        "trust=[running]",
    )
    stderr = capsys.readouterr().err
    assert code == 1
    [line] = [line for line in stderr.splitlines() if line.startswith("sdtune:")]
    assert "step 5: the loss or its gradient is not finite" in line
    assert "picture number" in line
    assert str(run / "checkpoints" / "step00000003.ckpt") in line
    # The checkpoint of step 6 is due before the flush of step 8; it checks the flag and is not written.
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step00000003.ckpt"]
    assert [row["step"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert not (run / "metrics.json").exists()
    assert not (run / "artifact").exists()
