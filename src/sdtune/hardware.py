"""What the machine at hand can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")
SWITCHES = ("gradient_checkpointing", "offload", "vae_tiling")
"""Keys of a ``hardware`` node that are a method's and not Lightning's."""


def check(node: Mapping[str, Any], here: bool = True) -> None:
    """ValueError for a ``hardware`` node that is wrong, or, if it is to run ``here``, that this machine cannot meet."""
    kind = str(node.get("accelerator", "auto"))
    if kind not in ACCELERATORS:
        raise ValueError(f"hardware.accelerator: {kind!r} is not one of {', '.join(ACCELERATORS)}")
    if here and kind in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"hardware.accelerator: {kind} is asked for, but torch {torch.__version__} sees no GPU;"
            " install a CUDA build of torch, or choose hardware=cpu"
        )
    wanted = str(node.get("precision", "auto"))
    if wanted not in PRECISIONS:
        raise ValueError(f"hardware.precision: {wanted!r} is not one of {', '.join(PRECISIONS)}")
    if wanted == "16-mixed" and kind == "cpu":
        raise ValueError("hardware.precision: a CPU has no 16-mixed; choose bf16-mixed or 32-true")
    for key in SWITCHES:
        if not isinstance(node.get(key, False), bool):
            raise ValueError(f"hardware.{key}: {node[key]!r}; give true or false")
    if node.get("offload") and processes(node) > 1:
        raise ValueError("hardware.offload: with several devices every process needs all of the model; leave it off")
    for key in ("devices", "num_nodes"):
        value = node.get(key, 1)
        if isinstance(value, bool) or (isinstance(value, int) and value < 1) or value == []:
            raise ValueError(f"hardware.{key}: {value!r}; give at least 1")


def check_indices(node: Mapping[str, Any]) -> None:
    """ValueError for GPUs by index that this machine has not."""
    if accelerator(str(node.get("accelerator", "auto"))) in ("gpu", "cuda"):
        there = torch.cuda.device_count()
        missing = [index for index in indices(node) if index not in range(there)]
        if missing:
            raise ValueError(f"hardware.devices: there is no GPU {missing[0]} here; there are {there}, counted from 0")


def processes(node: Mapping[str, Any]) -> int:
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
    """Samples that a process sees at once; ValueError where ``batch_size`` cannot be shared out."""
    parts = accumulation * processes(node)
    if batch_size % parts:
        raise ValueError(
            f"data.batch_size: {batch_size} samples a step cannot be shared out over {processes(node)}"
            f" device(s) x {accumulation} accumulation steps; choose a multiple of {parts}"
        )
    return batch_size // parts


def accelerator(wanted: str) -> str:
    """Lightning's ``accelerator``; ``auto`` is a CUDA GPU if there is one, else the CPU."""
    if wanted == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return wanted


def device(wanted: str) -> torch.device:
    """The device to sample on."""
    kind = accelerator(wanted)
    return torch.device("cuda" if kind == "gpu" else kind)


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices itself; emulated, it is slower than float32."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and any(flag in info.read_text() for flag in (" amx_bf16", " avx512_bf16"))


def precision(wanted: str, kind: str) -> str:
    """Lightning's ``precision``; ``auto`` is bf16-mixed where the device multiplies bfloat16 itself.

    Elsewhere it is 16-mixed on a GPU, with a gradient scaler, and 32-true on a CPU.
    """
    if wanted != "auto":
        return wanted
    if accelerator(kind) in ("gpu", "cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if kind != "mps" and _cpu_has_bf16() else "32-true"
