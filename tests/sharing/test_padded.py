"""What is dropped hangs on a run's own seed, and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdtune.sharing.padded import Padding, Pair
from sdtune.sharing.stack import Present, Stacked

NAME = "mid_block.to_q"


def kept(seeds: list[int], name: str = NAME) -> list[Tensor]:
    """For each run, which of its inputs are not dropped."""
    pairs = [Pair(torch.eye(64), torch.eye(64), 1.0, 0.5) for _ in seeds]
    present = Present()
    present.stacks = Padding(64).stacks({name: pairs}, torch.float32, seeds)
    base = nn.Linear(64, 64, bias=False).requires_grad_(False)
    nn.init.zeros_(base.weight)
    x = torch.ones(len(seeds) * 10, 64)
    return [part != 0 for part in Stacked(base, name, present)(x).chunk(len(seeds))]


def test_a_mask_is_its_runs_own() -> None:
    one, two = kept([1, 2])
    assert not torch.equal(one, two)
    assert torch.equal(kept([1, 3])[0], one)
    assert torch.equal(kept([1])[0], one)
    assert torch.equal(kept([4, 1])[1], one)


def test_each_step_and_each_site_has_a_mask_of_its_own() -> None:
    masks = [kept([seed])[0] for seed in range(20)] + [kept([0], f"site{i}")[0] for i in range(20)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 40
    assert 0.45 < torch.stack(masks).float().mean() < 0.55


def test_nothing_is_dropped_without_seeds() -> None:
    pairs = [Pair(torch.eye(4), torch.eye(4), 1.0, 0.5)]
    assert Padding(4).stacks({NAME: pairs}, torch.float32, None)[NAME].dropouts is None
