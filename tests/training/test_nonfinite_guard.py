"""A step that is not finite never reaches the weights, and ends the run with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from running import arguments, rows, train
from sdtune.training.nonfinite_guard import skip_if_not_finite


def stepped(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, value: float) -> torch.Tensor:
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)
    parameters[1].grad[0] = value
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    finite = skip_if_not_finite(optimizer, parameters, norm)
    optimizer.step()
    return finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fused_adamw_is_left_to_the_bit(bad: float) -> None:
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    assert stepped(parameters, optimizer, 0.5)
    weights = [p.detach().clone() for p in parameters]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    assert not stepped(parameters, optimizer, bad)
    for p, weight, kept in zip(parameters, weights, state, strict=True):
        assert torch.equal(p, weight)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in kept.items())
    assert stepped(parameters, optimizer, 0.5)  # and the one after is taken again
    assert all(not torch.equal(p, weight) for p, weight in zip(parameters, weights, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_another_optimizer_takes_no_step(bad: float) -> None:
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    weights = [p.detach().clone() for p in parameters]
    assert not stepped(parameters, optimizer, bad)
    assert all(torch.equal(p, weight) for p, weight in zip(parameters, weights, strict=True))
    assert stepped(parameters, optimizer, 0.5)
    assert all(not torch.equal(p, weight) for p, weight in zip(parameters, weights, strict=True))


def test_a_run_stops_at_the_next_flush_and_keeps_the_last_good_checkpoint(
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
    said = capsys.readouterr().err
    assert code == 1
    [line] = [line for line in said.splitlines() if line.startswith("sdtune:")]
    assert "step 5: the loss or its gradient is not finite" in line
    assert "picture number" in line
    assert str(run / "checkpoints" / "step00000003.ckpt") in line
    # The checkpoint of step 6 was due before the flush of step 8: it looked first, and was not written.
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step00000003.ckpt"]
    assert [row["step"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert not (run / "metrics.json").exists()
    assert not (run / "artifact").exists()
