"""Description of the GPU and of the software that a check ran with."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import torch

from experiments.gpu.clock import GIB
from sdtune.files import write_json


def describe(file: Path) -> None:
    """Write the properties of the GPU and the versions of the software to ``file``."""
    gpu = torch.cuda.get_device_properties(0)
    machine = {
        "gpu": gpu.name,
        "gib": gpu.total_memory / GIB,
        "capability": f"{gpu.major}.{gpu.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffusers": version("diffusers"),
        "cpus": os.cpu_count(),
    }
    write_json(file, machine)
