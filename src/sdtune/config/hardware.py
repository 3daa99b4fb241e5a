"""The config group ``hardware``: its checks, and what its settings mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdtune.errors import UserError
from sdtune.hardware.devices import ACCELERATORS, accelerator
from sdtune.hardware.precision import PRECISIONS

SWITCHES = ("gradient_checkpointing", "offload", "vae_tiling")
"""Keys of a ``hardware`` node that are a method's and not Lightning's."""

NOT_LIGHTNINGS = (*SWITCHES, "threads")
"""All keys of a ``hardware`` node that Lightning's Trainer does not take."""


def check_hardware(node: Mapping[str, Any], here: bool = True) -> None:
    """UserError for a ``hardware`` node that is wrong, or, if it is to run ``here``, that this machine cannot meet."""
    kind = str(node.get("accelerator", "auto"))
    if kind not in ACCELERATORS:
        raise UserError(f"{kind!r} is not one of {', '.join(ACCELERATORS)}", key="hardware.accelerator")
    if here and kind in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{kind} is asked for, but torch {torch.__version__} sees no GPU",
            key="hardware.accelerator",
            remedy="install a CUDA build of torch, or choose hardware=cpu",
        )
    wanted = str(node.get("precision", "auto"))
    if wanted not in PRECISIONS:
        raise UserError(f"{wanted!r} is not one of {', '.join(PRECISIONS)}", key="hardware.precision")
    if wanted == "16-mixed" and kind == "cpu":
        raise UserError("a CPU has no 16-mixed", key="hardware.precision", remedy="choose bf16-mixed or 32-true")
    for key in SWITCHES:
        if not isinstance(node.get(key, False), bool):
            raise UserError(f"{node[key]!r}", key=f"hardware.{key}", remedy="give true or false")
    if node.get("offload") and process_count(node) > 1:
        raise UserError(
            "with several devices every process needs all of the model", key="hardware.offload", remedy="leave it off"
        )
    threads = node.get("threads", "auto")
    if threads != "auto" and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise UserError(f"{threads!r}", key="hardware.threads", remedy="give auto, or a number of at least 1")
    for key in ("devices", "num_nodes"):
        value = node.get(key, 1)
        if isinstance(value, bool) or (isinstance(value, int) and value < 1) or value == []:
            raise UserError(f"{value!r}", key=f"hardware.{key}", remedy="give at least 1")


def check_indices(node: Mapping[str, Any]) -> None:
    """UserError for GPUs by index that this machine has not."""
    if accelerator(str(node.get("accelerator", "auto"))) in ("gpu", "cuda"):
        there = torch.cuda.device_count()
        missing = [index for index in indices(node) if index not in range(there)]
        if missing:
            raise UserError(
                f"there is no GPU {missing[0]} here; there are {there}, counted from 0", key="hardware.devices"
            )


def process_count(node: Mapping[str, Any]) -> int:
    """How many processes a ``hardware`` node asks for."""
    devices, kind = node.get("devices", 1), str(node.get("accelerator", "auto"))
    named = _named(devices)
    if named is not None:
        count = len(named)
    elif str(devices) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count()) if accelerator(kind) in ("gpu", "cuda") else 1
    else:
        count = int(devices) if str(devices).isdigit() else 1
    return count * int(node.get("num_nodes", 1))


def _named(devices: Any) -> list[Any] | None:
    """Devices that are named one by one; None where it is their number that is given."""
    if isinstance(devices, list):
        return devices
    return [index for index in str(devices).split(",") if index.strip()] if "," in str(devices) else None


def on_one(node: Mapping[str, Any]) -> dict[str, Any]:
    """A ``hardware`` node of a job that has one of the devices to itself, whatever its sweep has."""
    return {**node, "devices": 1, "num_nodes": 1}


def indices(node: Mapping[str, Any]) -> list[int]:
    """Which of the machine's GPUs a ``hardware`` node asks for."""
    devices = node.get("devices", 1)
    named = _named(devices)
    if named is not None:
        return [int(index) for index in named]
    return list(range(torch.cuda.device_count() if str(devices) in ("auto", "-1") else int(devices)))


def micro_batch(node: Mapping[str, Any], batch_size: int, accumulation: int) -> int:
    """Samples that a process sees at once; UserError where ``batch_size`` cannot be shared out."""
    parts = accumulation * process_count(node)
    if batch_size % parts:
        raise UserError(
            f"{batch_size} samples per step cannot be shared out over {process_count(node)}"
            f" device(s) x {accumulation} accumulation steps",
            key="data.batch_size",
            remedy=f"choose a multiple of {parts}",
        )
    return batch_size // parts


def local_processes(node: Mapping[str, Any]) -> int:
    """How many of the processes of a ``hardware`` node run on each machine."""
    return max(1, process_count(node) // int(node.get("num_nodes", 1)))
