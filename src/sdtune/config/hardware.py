"""The config group ``hardware``: checks, and numbers derived from its settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from sdtune.errors import UserError
from sdtune.hardware.devices import ACCELERATORS, accelerator
from sdtune.hardware.devices import device as device_of
from sdtune.hardware.precision import PRECISIONS
from sdtune.hardware.processes import is_launched_again, is_under_slurm, launched_processes

SWITCHES = ("gradient_checkpointing", "offload", "vae_tiling")
"""Keys of a ``hardware`` node that the method uses, not Lightning's Trainer."""

NON_LIGHTNING_KEYS = (*SWITCHES, "threads")
"""All keys of a ``hardware`` node that Lightning's Trainer does not accept."""


STRATEGIES = ("auto", "ddp")


def check_hardware(node: Mapping[str, Any], here: bool = True) -> None:
    """Check a ``hardware`` node; if ``here``, also check that this machine has the accelerator.

    Raises:
        UserError: a setting is invalid or needs hardware that is missing.
    """
    _check_counts(node)
    kind = str(node.get("accelerator", "auto"))
    if kind not in ACCELERATORS:
        raise UserError(f"{kind!r} is not one of {', '.join(ACCELERATORS)}", key="hardware.accelerator")
    if here:
        _check_available(kind)
    strategy = str(node.get("strategy", "auto"))
    if strategy not in STRATEGIES:
        # Others of Lightning's strategies shard the weights, or train a model per process without sharing gradients.
        raise UserError(f"{strategy!r} is not one of {', '.join(STRATEGIES)}", key="hardware.strategy")
    precision = str(node.get("precision", "auto"))
    if precision not in PRECISIONS:
        meant = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}.get(precision)
        remedy = None if meant is None else f"set hardware.precision={meant}"
        raise UserError(f"{precision!r} is not one of {', '.join(PRECISIONS)}", key="hardware.precision", remedy=remedy)
    if precision == "16-mixed" and (accelerator(kind) if here else kind) == "cpu":
        raise UserError("16-mixed needs a GPU", key="hardware.precision", remedy="set bf16-mixed or 32-true")
    for key in SWITCHES:
        if not isinstance(node.get(key, False), bool):
            raise UserError(f"{node[key]!r} is not a boolean", key=f"hardware.{key}", remedy="set true or false")
    if node.get("offload") and process_count(node) > 1:
        raise UserError(
            "not supported with several devices, every process needs the full model",
            key="hardware.offload",
            remedy="set hardware.offload=false",
        )
    threads = node.get("threads", "auto")
    if threads != "auto" and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise UserError(
            f"{threads!r} is not valid", key="hardware.threads", remedy="set auto or an integer of at least 1"
        )
    if here:
        _check_devices(node)


def _check_counts(node: Mapping[str, Any]) -> None:
    """Check the numbers of machines and devices of a ``hardware`` node."""
    nodes, devices = node.get("num_nodes", 1), node.get("devices", 1)
    if not _is_count(nodes):
        raise UserError(f"{nodes!r} is not valid", key="hardware.num_nodes", remedy="set at least 1")
    listed = _listed_indices(devices)
    is_valid = _is_count(devices) or str(devices) in ("auto", "-1")
    if not (is_valid if listed is None else listed and all(str(index).isdecimal() for index in listed)):
        raise UserError(
            f"{devices!r} is not valid", key="hardware.devices", remedy="set at least 1, or a list of indices of GPUs"
        )


def _is_count(value: Any) -> bool:
    return str(value).isdecimal() and int(value) > 0


def _check_available(kind: str) -> None:
    """Check that this machine has the accelerator ``kind``."""
    missing = {
        "gpu": not torch.cuda.is_available(),
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
    }
    if missing.get(kind):
        found = "no Apple GPU" if kind == "mps" else "no GPU"
        remedy = "set hardware=cpu" if kind == "mps" else "install a CUDA build of torch or set hardware=cpu"
        raise UserError(
            f"{kind} is set, but torch {torch.__version__} finds {found}", key="hardware.accelerator", remedy=remedy
        )


def check_launcher(node: Mapping[str, Any]) -> None:
    """Check that a launcher has started as many processes as a ``hardware`` node has.

    Otherwise Lightning raises an error after the data has been read, or each process trains alone.

    Raises:
        UserError: the numbers differ, or SLURM does not state the number of tasks per node.
    """
    if is_launched_again():
        return
    expected, nodes = process_count(node), int(node.get("num_nodes", 1))
    started = launched_processes()
    if not is_under_slurm():
        if started != expected and "WORLD_SIZE" in os.environ:
            raise UserError(
                f"{expected} process(es) in the settings, but the launcher has started {started} (WORLD_SIZE)",
                key="hardware.devices",
                remedy="set hardware.devices (per node) and hardware.num_nodes to match, or unset WORLD_SIZE",
            )
        return
    tasks_per_node, slurm_nodes = os.environ.get("SLURM_NTASKS_PER_NODE"), os.environ.get("SLURM_NNODES", "1")
    per_node = started if tasks_per_node is None and slurm_nodes == "1" else tasks_per_node
    if started != expected or str(per_node) != str(expected // nodes) or (tasks_per_node is None and started > 1):
        raise UserError(
            f"{expected} process(es) in the settings, but SLURM has {started} task(s) on {slurm_nodes} node(s)",
            key="hardware.devices",
            remedy="start with srun --ntasks-per-node=DEVICES, or unset SLURM_NTASKS to train alone",
        )


def _check_devices(node: Mapping[str, Any]) -> None:
    """Check that the devices of a ``hardware`` node exist on this machine.

    Raises:
        UserError: an index is out of range or repeated, or there are fewer devices, or indices are given for a CPU.
    """
    devices, kind = node.get("devices", 1), accelerator(str(node.get("accelerator", "auto")))
    listed = _listed_indices(devices)
    if kind == "cpu":
        if listed is not None:
            raise UserError(
                f"{devices} are indices of GPUs, but the training uses none",
                key="hardware.devices",
                remedy="set hardware.devices=1",
            )
        return
    count = 1 if kind == "mps" else torch.cuda.device_count()
    used = list(range(count)) if str(devices) in ("auto", "-1") else indices(node)
    missing = [index for index in used if index not in range(count)]
    if listed is not None and (missing or len(set(used)) < len(used)):
        wrong = f"no GPU with index {missing[0]}" if missing else f"{devices} has an index twice"
        raise UserError(wrong, key="hardware.devices", remedy=f"use indices below {count}, each once")
    if missing:
        raise UserError(
            f"{devices} GPUs are set, this machine has {count}", key="hardware.devices", remedy="set a smaller number"
        )


def process_count(node: Mapping[str, Any]) -> int:
    """Number of processes of a ``hardware`` node."""
    devices, kind = node.get("devices", 1), str(node.get("accelerator", "auto"))
    listed = _listed_indices(devices)
    if listed is not None:
        count = len(listed)
    elif str(devices) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count()) if accelerator(kind) in ("gpu", "cuda") else 1
    else:
        count = int(devices) if str(devices).isdigit() else 1
    return count * int(node.get("num_nodes", 1))


def _listed_indices(devices: Any) -> list[Any] | None:
    """Device indices if ``devices`` is a list; None if it is a number of devices."""
    if isinstance(devices, list):
        return devices
    return [index for index in str(devices).split(",") if index.strip()] if "," in str(devices) else None


def single_device(node: Mapping[str, Any]) -> dict[str, Any]:
    """The ``hardware`` node for a job that uses a single device of the devices of its sweep."""
    return {**node, "devices": 1, "num_nodes": 1}


def indices(node: Mapping[str, Any]) -> list[int]:
    """Indices of the GPUs that a ``hardware`` node uses."""
    devices = node.get("devices", 1)
    listed = _listed_indices(devices)
    if listed is not None:
        return [int(index) for index in listed]
    return list(range(torch.cuda.device_count() if str(devices) in ("auto", "-1") else int(devices)))


def first_device(node: Mapping[str, Any]) -> torch.device:
    """The first device of a ``hardware`` node, for a command that generates images in one process."""
    kind = device_of(str(node.get("accelerator", "auto")))
    return torch.device("cuda", indices(node)[0]) if kind.type == "cuda" else kind


def micro_batch(node: Mapping[str, Any], batch_size: int, accumulation: int) -> int:
    """Samples per micro-batch and process.

    Raises:
        UserError: ``batch_size`` is not divisible by processes times accumulation steps.
    """
    parts = accumulation * process_count(node)
    if batch_size % parts:
        raise UserError(
            f"{batch_size} samples per step cannot be divided over {process_count(node)}"
            f" device(s) x {accumulation} accumulation steps",
            key="data.batch_size",
            remedy=f"set a multiple of {parts}",
        )
    return batch_size // parts


def local_processes(node: Mapping[str, Any]) -> int:
    """Number of processes of a ``hardware`` node per machine."""
    return max(1, process_count(node) // int(node.get("num_nodes", 1)))
