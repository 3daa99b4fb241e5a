"""AdamW has 8-bit states only for many parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdtune.errors import UserError
from sdtune.training.adamw8bit import AdamW8bit
from sdtune.training.adamw_by_size import LARGE, AdamWBySize


def groups(count: int) -> list[dict[str, object]]:
    halves = [nn.Parameter(torch.empty(size, device="meta")) for size in (count // 2, count - count // 2)]
    return [{"name": "denoiser", "params": halves[:1]}, {"name": "text_encoder", "params": halves[1:], "lr": 1e-6}]


def test_states_have_eight_bits_from_the_limit() -> None:
    small = AdamWBySize(1e-5, weight_decay=0.1)(groups(LARGE - 1))
    large = AdamWBySize(1e-5, weight_decay=0.1)(groups(LARGE))
    assert type(small) is torch.optim.AdamW
    assert small.defaults["fused"]
    assert type(large) is AdamW8bit
    for optimizer in (small, large):
        assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-6]
        assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"optimizer: 8-bit AdamW needs bitsandbytes"):
        AdamWBySize(1e-5)(groups(LARGE))
    AdamWBySize(1e-5)(groups(10))
