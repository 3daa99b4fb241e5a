"""Out-of-memory errors: how to recognise them, and what to do about them; imports no torch."""

from __future__ import annotations

import sys
from typing import Final

ADVICE: Final = {
    "training": (
        "out of memory on the device: give hardware=gpu_12gb,{smaller} or a smaller data.resolution; sdtune plan"
        " fits=GIB with the same settings says what would do"
    ),
    "prepare": "out of memory on the device: give a smaller data.resolution, or hardware=cpu",
    "sample": (
        "out of memory on the device: draw fewer images at once (sampling.batch_size=1, hardware.vae_tiling=true), or"
        " choose hardware=cpu"
    ),
    "evaluate": "out of memory on the device: choose hardware=cpu, or a machine with more memory",
    "after training": (
        "out of memory while the trained model was measured; its artifact is written. sdtune train {resume} goes on"
        " there, with hardware=cpu on another device"
    ),
    "shared": "out of memory on the device with {runs} runs at once: give hydra.launcher.max_concurrent_runs={fewer}",
    "shared by one": "out of memory on the device with one run at a time: give hardware.gradient_checkpointing=true",
    "other": "out of memory: end other programs, or choose a machine with more",
}
"""What to do, by the command or by what it was doing; ``str.format`` fills in the names in braces."""

_WITHOUT_TYPE = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
"""In the text of a plain ``RuntimeError``, by which parts of torch and CUDA report a failed allocation."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed, on a GPU, on Apple's MPS or on the CPU."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in _WITHOUT_TYPE)
