"""Choice of the device."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def accelerator(wanted: str) -> str:
    """Lightning's ``accelerator``; ``auto`` is a CUDA GPU if available, else Apple's GPU, else the CPU."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return "gpu"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return wanted


def device(wanted: str) -> torch.device:
    """torch device for sampling; ``wanted`` as in :func:`accelerator`."""
    kind = accelerator(wanted)
    return torch.device("cuda" if kind == "gpu" else kind)


_COMPUTE_CAPABILITY_MAJOR = 75
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` of the CUDA driver API."""


def compute_capability() -> int | None:
    """Major compute capability of the first visible NVIDIA GPU; None if the driver cannot tell.

    Unlike torch's query, this creates no CUDA context, which takes some hundred MB of the GPU's memory: the parent
    process of a sweep checks the configs of its jobs, but computes nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        gpu, major = ctypes.c_int(), ctypes.c_int()
        failures = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(gpu), 0)
            or driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, gpu)
        )
        return None if failures else major.value
    return None


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to ``device`` without waiting; copies are asynchronous only from pinned memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
