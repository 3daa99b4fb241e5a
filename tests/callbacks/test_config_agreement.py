"""Processes with different configs or data are refused; a single process is not checked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdtune.callbacks.config_agreement import ConfigAgreement
from sdtune.errors import UserError


def trainer(rank: int, digests: list[str], data: list[str]) -> Any:
    """A process of a run of two, whose processes have these digests of the config and of the data."""
    exchanged = iter([*digests, *data])
    strategy = SimpleNamespace(broadcast=lambda value, src: next(exchanged))
    datamodule = SimpleNamespace(fingerprint=data[rank])
    return SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy, datamodule=datamodule)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_refuses_different_configs_and_different_data(rank: int) -> None:
    agreement = ConfigAgreement({"optimizer": {"lr": 1e-3}})
    agreement.setup(trainer(rank, ["a", "a"], ["b", "b"]), None, "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"process 1 was started with a different config \(other\) than process 0"):
        agreement.setup(trainer(rank, ["a", "other"], ["b", "b"]), None, "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"process 1 .* different images, captions or masks \(c\) than process 0 \(b\)"):
        agreement.setup(trainer(rank, ["a", "a"], ["b", "c"]), None, "fit")  # type: ignore[arg-type]


def test_digest_is_that_of_the_config() -> None:
    digests = {ConfigAgreement({"optimizer": {"lr": lr}}).digest for lr in (1e-3, 1e-4, 1e-3)}
    assert len(digests) == 2


def test_single_process_is_not_checked() -> None:
    ConfigAgreement({"optimizer": {}}).setup(SimpleNamespace(world_size=1), None, "fit")  # type: ignore[arg-type]
