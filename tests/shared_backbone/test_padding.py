"""Pairs lie beside zeros, step after step; what is dropped hangs on a run's own seed, and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdtune.shared_backbone.batched_lora import Present, Stacked
from sdtune.shared_backbone.padding import Padding, Pair

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


def test_one_that_drops_and_leaves_moves_nothing() -> None:
    base = nn.Linear(64, 64).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2 * 10, 64, dtype=torch.bfloat16)
    own = Pair(torch.randn(3, 64), torch.randn(64, 3), 0.7, 0.0)
    seen = []
    for beside in (Pair(torch.randn(5, 64), torch.randn(64, 5), 1.0, 0.5), None):
        pair = own._replace(down=own.down.clone().requires_grad_(), up=own.up.clone().requires_grad_())
        present, inputs = Present(), x.clone().requires_grad_()
        present.stacks = Padding(8).stacks({NAME: [pair, beside]}, torch.bfloat16, [1, 2])
        out = Stacked(base, NAME, present)(inputs)
        out.float().square().sum().backward()
        assert inputs.grad is not None
        seen.append((out[:10], inputs.grad[:10], pair.down.grad, pair.up.grad))
    assert all(torch.equal(here, there) for here, there in zip(*seen, strict=True))


def drawn(rank: int, scale: float = 1.0) -> Pair:
    down, up = torch.randn(rank, 6), torch.randn(5, rank)
    return Pair(down.requires_grad_(), up.requires_grad_(), scale, 0.0)


def test_a_step_has_its_own_pairs_and_zeros_beside_them() -> None:
    padding = Padding(4)
    # The last two have the shapes of the first, and the second those of nobody.
    for ranks in ((2, 3), (None, 1), (2, 3), (2, 3)):
        pairs = [None if rank is None else drawn(rank, scale=0.3) for rank in ranks]
        downs, ups, _ = padding.stacks({NAME: pairs}, torch.float32, None)[NAME]
        (downs.sum() + 2 * ups.sum()).backward()
        for place, pair in enumerate(pairs):
            rank = 0 if pair is None else len(pair.down)
            assert not downs[place, rank:].any()
            assert not ups[place, rank:].any()
            if pair is not None:
                assert torch.equal(downs[place, :rank], pair.down)
                torch.testing.assert_close(ups[place, :rank], 0.3 * pair.up.T)
                torch.testing.assert_close(pair.up.grad, torch.full_like(pair.up, 0.6))
                assert torch.equal(pair.down.grad, torch.ones_like(pair.down))


def test_a_step_is_not_padded_into_one_that_has_not_gone_back() -> None:
    padding, first, second = Padding(4), drawn(2), drawn(2)
    losses = []
    for pair in (first, second):
        downs, ups, _ = padding.stacks({NAME: [pair]}, torch.float32, None)[NAME]
        losses.append((ups.transpose(1, 2) @ downs).sum())
    torch.autograd.backward(losses)
    for pair in (first, second):
        wanted = torch.autograd.grad((pair.up @ pair.down).sum(), (pair.down, pair.up))
        torch.testing.assert_close((pair.down.grad, pair.up.grad), wanted)


def test_a_step_takes_the_memory_of_one_that_has_gone_back() -> None:
    padding, pairs = Padding(4), [drawn(2)]
    places = set()
    for _ in range(3):
        downs, ups, _ = padding.stacks({NAME: pairs}, torch.float32, None)[NAME]
        (downs.sum() + ups.sum()).backward()
        with torch.no_grad():
            drawing = padding.stacks({NAME: pairs}, torch.float32, None)[NAME]
        places |= {downs.data_ptr(), drawing.downs.data_ptr()}
    assert len(places) == 1
