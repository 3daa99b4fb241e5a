"""Out-of-memory errors: how to recognise them, and what to do about them; imports no torch."""

from __future__ import annotations

import sys
from typing import Final

ADVICE: Final = {
    "drawing": (
        "out of memory on the device: draw fewer images at once (sampling.batch_size=1, hardware.vae_tiling=true), or"
        " choose hardware=cpu"
    ),
    "training": (
        "out of memory on the device: give hardware=gpu_12gb,{smaller} or a smaller data.resolution; sdtune plan"
        " fits=GIB with the same settings says what would do"
    ),
    "sharing": (
        "out of memory on the device with {runs} runs at once: give hydra.launcher.max_concurrent_runs={fewer}"
    ),
    "sharing alone": ("out of memory on the device with one run at a time: give hardware.gradient_checkpointing=true"),
}
"""What to do, by what ran out of memory; ``str.format`` fills in the names in braces."""

_WITHOUT_TYPE = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Parts of torch and CUDA that report a failed allocation by name, as a plain ``RuntimeError``."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in _WITHOUT_TYPE)
