"""Padded LoRA pairs: zeros, reuse of buffers, and dropout that depends only on the seed of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdtune.shared_backbone.batched_lora import BatchedLoRALayer, CurrentBatch
from sdtune.shared_backbone.padding import LoRAPair, Padding

NAME = "mid_block.to_q"


def kept_inputs(seeds: list[int], name: str = NAME) -> list[Tensor]:
    """Masks of the inputs that dropout keeps, one for each run."""
    pairs = [LoRAPair(torch.eye(64), torch.eye(64), 1.0, 0.5) for _ in seeds]
    present = CurrentBatch()
    present.stacks = Padding(64).stacks({name: pairs}, torch.float32, seeds)
    base = nn.Linear(64, 64, bias=False).requires_grad_(False)
    nn.init.zeros_(base.weight)
    x = torch.ones(len(seeds) * 10, 64)
    return [part != 0 for part in BatchedLoRALayer(base, name, present)(x).chunk(len(seeds))]


def test_dropout_mask_depends_only_on_the_seed_of_its_run() -> None:
    one, two = kept_inputs([1, 2])
    assert not torch.equal(one, two)
    assert torch.equal(kept_inputs([1, 3])[0], one)
    assert torch.equal(kept_inputs([1])[0], one)
    assert torch.equal(kept_inputs([4, 1])[1], one)


def test_each_step_and_each_layer_has_its_own_dropout_mask() -> None:
    masks = [kept_inputs([seed])[0] for seed in range(20)] + [kept_inputs([0], f"site{i}")[0] for i in range(20)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 40
    assert 0.45 < torch.stack(masks).float().mean() < 0.55


def test_dropout_is_disabled_without_seeds() -> None:
    pairs = [LoRAPair(torch.eye(4), torch.eye(4), 1.0, 0.5)]
    assert Padding(4).stacks({NAME: pairs}, torch.float32, None)[NAME].dropouts is None


def test_end_of_a_run_with_dropout_does_not_change_the_other_run() -> None:
    base = nn.Linear(64, 64).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2 * 10, 64, dtype=torch.bfloat16)
    original = LoRAPair(torch.randn(3, 64), torch.randn(64, 3), 0.7, 0.0)
    results = []
    for other in (LoRAPair(torch.randn(5, 64), torch.randn(64, 5), 1.0, 0.5), None):
        pair = original._replace(down=original.down.clone().requires_grad_(), up=original.up.clone().requires_grad_())
        present, inputs = CurrentBatch(), x.clone().requires_grad_()
        present.stacks = Padding(8).stacks({NAME: [pair, other]}, torch.bfloat16, [1, 2])
        out = BatchedLoRALayer(base, NAME, present)(inputs)
        out.float().square().sum().backward()
        assert inputs.grad is not None
        results.append((out[:10], inputs.grad[:10], pair.down.grad, pair.up.grad))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def random_pair(rank: int, scale: float = 1.0) -> LoRAPair:
    down, up = torch.randn(rank, 6), torch.randn(5, rank)
    return LoRAPair(down.requires_grad_(), up.requires_grad_(), scale, 0.0)


def test_pairs_are_padded_with_zeros_in_each_step() -> None:
    padding = Padding(4)
    # The last two steps have the shapes of the first step; the second step has other shapes.
    for ranks in ((2, 3), (None, 1), (2, 3), (2, 3)):
        pairs = [None if rank is None else random_pair(rank, scale=0.3) for rank in ranks]
        downs, ups, _ = padding.stacks({NAME: pairs}, torch.float32, None)[NAME]
        (downs.sum() + 2 * ups.sum()).backward()
        for index, pair in enumerate(pairs):
            rank = 0 if pair is None else len(pair.down)
            assert not downs[index, rank:].any()
            assert not ups[index, rank:].any()
            if pair is not None:
                assert torch.equal(downs[index, :rank], pair.down)
                torch.testing.assert_close(ups[index, :rank], 0.3 * pair.up.T)
                torch.testing.assert_close(pair.up.grad, torch.full_like(pair.up, 0.6))
                assert torch.equal(pair.down.grad, torch.ones_like(pair.down))


def test_buffer_is_not_reused_before_its_backward_pass() -> None:
    padding, first, second = Padding(4), random_pair(2), random_pair(2)
    losses = []
    for pair in (first, second):
        downs, ups, _ = padding.stacks({NAME: [pair]}, torch.float32, None)[NAME]
        losses.append((ups.transpose(1, 2) @ downs).sum())
    torch.autograd.backward(losses)
    for pair in (first, second):
        expected = torch.autograd.grad((pair.up @ pair.down).sum(), (pair.down, pair.up))
        torch.testing.assert_close((pair.down.grad, pair.up.grad), expected)


def test_buffer_is_reused_after_its_backward_pass() -> None:
    padding, pairs = Padding(4), [random_pair(2)]
    addresses = set()
    for _ in range(3):
        downs, ups, _ = padding.stacks({NAME: pairs}, torch.float32, None)[NAME]
        (downs.sum() + ups.sum()).backward()
        with torch.no_grad():
            inference = padding.stacks({NAME: pairs}, torch.float32, None)[NAME]
        addresses |= {downs.data_ptr(), inference.downs.data_ptr()}
    assert len(addresses) == 1
