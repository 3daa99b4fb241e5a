"""Detection of out-of-memory errors, and advice for each command; imports no torch."""

from __future__ import annotations

import sys
from typing import Final

ADVICE: Final = {
    "training": (
        "out of memory on the device: set hardware=gpu_12gb,{smaller} or a smaller data.resolution; sdtune plan"
        " fits=GIB with the same settings shows what fits"
    ),
    "prepare": "out of memory on the device: set a smaller data.resolution, or hardware=cpu",
    "sample": ("out of memory on the device: set sampling.batch_size=1 and hardware.vae_tiling=true, or hardware=cpu"),
    "evaluate": "out of memory on the device: set hardware=cpu, or use a machine with more memory",
    "caption": "out of memory on the device: set batch_size=1, or hardware=cpu",
    "mask": "out of memory on the device: set batch_size=1, or hardware=cpu",
    "shared": "out of memory on the device with {runs} concurrent runs: set hydra.launcher.max_concurrent_runs={fewer}",
    "shared by one": "out of memory on the device with one run at a time: set hardware.gradient_checkpointing=true",
    "other": "out of memory: end other programs, or use a machine with more memory",
}
"""Message by command or phase; the names in braces are filled in with ``str.format``."""

_WITHOUT_TYPE = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
"""Texts by which a plain ``RuntimeError`` of torch or CUDA is recognized as a failed allocation."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a failed memory allocation on a GPU, Apple's MPS or the CPU."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in _WITHOUT_TYPE)
