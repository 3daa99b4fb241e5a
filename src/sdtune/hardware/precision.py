"""Choice of the precision that a device supports in hardware, and autocast."""

from __future__ import annotations

from pathlib import Path

import torch

from sdtune.hardware.devices import accelerator

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")

HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""16-bit dtype of each mixed precision of Lightning."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast of Lightning's ``precision``; the meta device uses that of the CPU (:mod:`sdtune.planning.kernels`)."""
    kind = "cpu" if device.type == "meta" else device.type
    return torch.autocast(kind, HALVES.get(precision, torch.bfloat16), enabled=precision in HALVES)


def _cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions; emulated bfloat16 is slower than float32."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and any(flag in info.read_text(encoding="utf-8") for flag in (" amx_bf16", " avx512_bf16"))


def precision(wanted: str, kind: str) -> str:
    """Lightning's ``precision``; ``auto`` is bf16-mixed if the device supports bfloat16 in hardware.

    Otherwise it is 16-mixed (with a gradient scaler) on a GPU and 32-true on a CPU.
    """
    if wanted != "auto":
        return wanted
    if accelerator(kind) in ("gpu", "cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if kind != "mps" and _cpu_has_bf16() else "32-true"
