"""Processes with two configs are refused; one process has nothing to compare."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sdtune.callbacks.config_agreement import ConfigAgreement
from sdtune.errors import UserError


def test_processes_must_have_one_config() -> None:
    one, other = ConfigAgreement({"optimizer": {"lr": 1e-3}}), ConfigAgreement({"optimizer": {"lr": 1e-4}})
    strategy = SimpleNamespace(broadcast=lambda digest: one.digest)
    trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)
    one.setup(trainer, None, "fit")
    with pytest.raises(UserError, match=f"process 1 was started with another config .* than process 0 .{one.digest}"):
        other.setup(trainer, None, "fit")
    other.setup(SimpleNamespace(world_size=1), None, "fit")
