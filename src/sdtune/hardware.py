"""What the machine at hand can do."""

from __future__ import annotations

from pathlib import Path

import torch

PRECISIONS = ("auto", "32-true", "bf16-mixed", "64-true")


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices itself; emulated, it is slower than float32."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and any(flag in info.read_text() for flag in (" amx_bf16", " avx512_bf16"))


def precision(wanted: str, accelerator: str) -> str:
    """Lightning's ``precision``, ``auto`` decided: bf16-mixed where the device has it, else 32-true."""
    if wanted not in PRECISIONS:
        raise ValueError(f"hardware.precision: {wanted!r} is not one of {', '.join(PRECISIONS)}")
    if wanted != "auto":
        return wanted
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if _cpu_has_bf16() else "32-true"
