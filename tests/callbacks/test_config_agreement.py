"""Processes with different configs are refused; a single process is not checked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sdtune.callbacks.config_agreement import ConfigAgreement
from sdtune.errors import UserError


def test_processes_with_different_configs_are_refused() -> None:
    agreement, other_agreement = (
        ConfigAgreement({"optimizer": {"lr": 1e-3}}),
        ConfigAgreement({"optimizer": {"lr": 1e-4}}),
    )
    strategy = SimpleNamespace(broadcast=lambda digest: agreement.digest)
    trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)
    agreement.setup(trainer, None, "fit")
    with pytest.raises(
        UserError, match=f"process 1 was started with a different config .* than process 0 .{agreement.digest}"
    ):
        other_agreement.setup(trainer, None, "fit")
    other_agreement.setup(SimpleNamespace(world_size=1), None, "fit")
