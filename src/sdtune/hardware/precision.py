"""Choice of the precision that a device supports in hardware, and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sdtune.hardware.devices import accelerator, compute_capability

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")

HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""16-bit dtype of each mixed precision of Lightning."""

_FIRST_WITH_BF16 = 8
"""Major compute capability of NVIDIA's Ampere generation. Earlier generations have no bfloat16."""


def autocast_kind(device: torch.device) -> str:
    """Device type whose autocast applies on ``device``; the meta device uses that of the CPU."""
    return "cpu" if device.type == "meta" else device.type


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast of Lightning's ``precision``; the meta device uses that of the CPU (:mod:`sdtune.planning.kernels`)."""
    return torch.autocast(autocast_kind(device), HALVES.get(precision, torch.bfloat16), enabled=precision in HALVES)


def generation_dtype(device: torch.device, chosen: str = "auto") -> torch.dtype | None:
    """Dtype of the weights of a model that only generates images; None: float32.

    By default a CPU generates in float32, other devices in the half precision that they support.

    Args:
        chosen: Lightning's precision; ``auto``: that of the device.
    """
    if chosen == "auto" and device.type == "cpu":
        return None
    return HALVES.get(precision(chosen, device.type))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Context manager that sets torch's default dtype, which is global to all threads."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


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
        capability = compute_capability()
        if capability is None:  # not an NVIDIA GPU
            return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        return "bf16-mixed" if capability >= _FIRST_WITH_BF16 else "16-mixed"
    return "bf16-mixed" if accelerator(kind) == "cpu" and _cpu_has_bf16() else "32-true"
