"""The settings of the hardware group agree with the program that has started the processes."""

from __future__ import annotations

from typing import Any

import pytest

from sdtune.config.hardware import check_hardware, check_launcher
from sdtune.errors import UserError

LAUNCHER = ("WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES",
            "SLURM_JOB_NAME")  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "node"),
    [
        ({}, {"devices": 4}),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, {"devices": 2}),
        ({"WORLD_SIZE": "4"}, {"devices": 2, "num_nodes": 2}),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"devices": 1}),  # started by Lightning
        ({"SLURM_NTASKS": "1"}, {"devices": 1}),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"}, {"devices": 2, "num_nodes": 2}),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, {"devices": 1}),
    ],
)
def test_matching_numbers_of_processes_are_accepted(
    environment: dict[str, str], node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    check_launcher({"accelerator": "cpu", **node})


@pytest.mark.parametrize(
    ("environment", "node", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            {},
            r"1 process\(es\) .*, but the launcher has started 2 \(WORLD_SIZE\); set",
        ),
        ({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, {"devices": 2}, "has started 1"),
        (
            {"SLURM_NTASKS": "4"},
            {},
            r"1 process\(es\) .*, but SLURM has 4 task\(s\) on 1 node\(s\); start",
        ),
        ({"SLURM_NTASKS": "4"}, {"devices": 4}, "start with srun --ntasks-per-node=DEVICES"),
        ({"SLURM_NTASKS": "1"}, {"devices": 4}, r"4 process\(es\) in the settings, but SLURM has 1 task"),
        (
            {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1"},
            {"devices": 2, "num_nodes": 2},
            "SLURM has 4 task",
        ),
    ],
)
def test_other_numbers_of_processes_are_refused(
    environment: dict[str, str], node: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=f"^hardware\\.devices: .*{message}"):
        check_launcher({"accelerator": "cpu", **node})


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed", "ddp_spawn", "dp"])
def test_other_strategies_are_refused(strategy: str) -> None:
    with pytest.raises(UserError, match=rf"^hardware\.strategy: '{strategy}' is not one of auto, ddp$"):
        check_hardware({"accelerator": "cpu", "strategy": strategy})
