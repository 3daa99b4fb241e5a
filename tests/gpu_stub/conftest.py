"""Fixtures of the stub GPU; its tests are skipped where it cannot be built."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpu_stub import shapes
from gpu_stub.build import build, obstacle
from gpu_stub.run import Measured, run

EVALUATION = ("evaluation.sampling.sampler=ddim",)
"""Other samplers search their step among values on the device, which the stub does not have."""

Run = Callable[..., Measured]


@pytest.fixture(scope="session")
def work() -> Path:
    """Folder of the libraries and of the models, kept between sessions; the weights are sparse files."""
    folder = Path(os.environ.get("GPU_STUB_WORK", "outputs/gpu-stub")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def libraries(work: Path) -> Path:
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    build(work / "libraries")
    return work / "libraries"


@pytest.fixture(scope="session")
def photos(work: Path) -> Path:
    """Four images of 512x512 pixels with captions."""
    folder = work / "images"
    folder.mkdir(exist_ok=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of sks dog, {number}", encoding="utf-8")
    return folder


@pytest.fixture
def training(libraries: Path, work: Path, photos: Path, tmp_path: Path) -> Iterator[Run]:
    """Runs ``sdtune train`` on a recipe at the true shapes of ``kind``, with an evaluation by CLIP.

    The run folder is removed after the test: checkpoints of 10 GB would fill the disk.
    """

    def start(
        recipe: str, kind: str, *more: str, gib: float = 80, steps: int = 10, devices: int = 1, sweep: bool = False
    ) -> Measured:
        overrides = [
            f"experiment={recipe}",
            f"backbone.path={shapes.pipeline(work, kind)}",
            f"backbone.clip={shapes.clip(work)}",
            *([] if "evaluation=none" in more else ["evaluation=clip", "evaluation.images=8", *EVALUATION]),
            f"data.path={photos}",
            f"trainer.max_steps={steps}",
            f"hydra.{'sweep' if sweep else 'run'}.dir={tmp_path / 'run'}",
            *([] if "callbacks.samples=null" in more else ["callbacks.samples.sampling.sampler=ddim"]),
            *more,
        ]
        return run(libraries, tmp_path, "train", *(["-m"] if sweep else []), *overrides, gib=gib, devices=devices)

    yield start
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
