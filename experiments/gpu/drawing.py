"""Speed of the generation of images with a LoRA."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from experiments.gpu.clock import GIB
from sdtune.backbone import Pretrained
from sdtune.backbone.families import SD1, SDXL
from sdtune.files import write_json
from sdtune.hardware.precision import generation_dtype
from sdtune.loaders.artifact import artifacts_applied
from sdtune.loaders.lora import AdapterFile, load_adapters
from sdtune.sampling.load import load_to_generate
from sdtune.sampling.loop import Request, Sampling, generate

_IMAGES = 4
_DENOISING_STEPS = 20


def draw(work: Path, kind: str, file: Path) -> None:
    """Generate a batch of images twice, first with few steps, and write the speed of the second to ``file``."""
    device = torch.device("cuda")
    source = Pretrained(str(work / kind), guidance=(SDXL if kind == "sdxl" else SD1).guidance)
    backbone = load_to_generate(source, device, generation_dtype(device))
    loras = load_adapters(backbone, [AdapterFile(str(work / f"{kind}-lora"))], source)
    requests = [Request("a photo of a cat", seed) for seed in range(_IMAGES)]
    seconds = 0.0
    with artifacts_applied(backbone, loras):
        for steps in (2, _DENOISING_STEPS):
            settings = Sampling(steps, guidance=source.guidance, sampler="ddim", batch_size=_IMAGES)
            torch.cuda.synchronize()
            began = time.perf_counter()
            images = list(generate(backbone, requests, settings))
            assert len(images) == _IMAGES
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    speed = {"images_per_second": _IMAGES / seconds, "denoising_steps": _DENOISING_STEPS, "batch": _IMAGES}
    write_json(file, {**speed, "peak_gib": torch.cuda.max_memory_allocated() / GIB})
