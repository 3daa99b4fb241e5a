"""Choice of the device."""

from __future__ import annotations

import torch

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def accelerator(wanted: str) -> str:
    """Lightning's ``accelerator``; ``auto`` is a CUDA GPU if available, else the CPU."""
    if wanted == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return wanted


def device(wanted: str) -> torch.device:
    """torch device for sampling; ``wanted`` as in :func:`accelerator`."""
    kind = accelerator(wanted)
    return torch.device("cuda" if kind == "gpu" else kind)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to ``device`` without waiting; copies are asynchronous only from pinned memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
