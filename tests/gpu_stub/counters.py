"""The stub GPU of this process, which ``libgpustub.so`` has to be preloaded into: counters and memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch

NAMES = (
    "launches",
    "matrix_products",
    "convolutions",
    "stream_waits",
    "device_waits",
    "event_waits",
    "host_to_device",
    "host_to_device_bytes",
    "device_to_host",
    "device_to_host_bytes",
    "mallocs",
    "host_allocs",
    "collectives",
)
"""Names of the counters, in the order of counters.h."""

_BUILD = Path(os.environ["GPU_STUB_BUILD"])
_LIBRARY = ctypes.CDLL(str(_BUILD / "libgpustub.so"))
_LIBRARY.stub_peak.restype = ctypes.c_size_t


def counters() -> dict[str, int]:
    """Calls of the CUDA runtime since :func:`reset`. ``launches`` includes matrix products and convolutions."""
    values = (ctypes.c_longlong * len(NAMES))()
    _LIBRARY.stub_counters(values)
    named = dict(zip(NAMES, values, strict=True))
    return named | {"launches": named["launches"] + named["matrix_products"]}


def reset() -> None:
    _LIBRARY.stub_reset_counters()


def device_peak(device: int = 0) -> int:
    """Maximum number of bytes that the process has taken from the driver, without the context."""
    return int(_LIBRARY.stub_peak(device))


def install() -> None:
    """Load the convolutions, and give values on the device a meaning where the code decides by them."""
    torch.ops.load_library(str(_BUILD / "libconvolution.so"))
    torch.backends.cuda.enable_cudnn_sdp(False)
    to_bool, to_list = torch.Tensor.__bool__, torch.Tensor.tolist

    def is_true(tensor: torch.Tensor) -> bool:
        # The cache refuses values that are not finite.
        caller = sys._getframe(1).f_code.co_filename
        return to_bool(tensor) or (tensor.is_cuda and caller.endswith("sdtune/data/cache.py"))

    def ones(tensor: torch.Tensor) -> Any:
        # Losses and the flags that they are finite.
        values = to_list(tensor)
        return _with_ones(values) if tensor.is_cuda else values

    torch.Tensor.__bool__ = is_true  # type: ignore[assignment]
    torch.Tensor.tolist = ones  # type: ignore[method-assign]


def _with_ones(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_ones(item) for item in value]
    return 1.0 if isinstance(value, float) else value
