"""cudnn.benchmark and TF32 during a training on CUDA, and their values after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from image_data import noise, opened
from sdtune.callbacks.cuda_backends import CudaBackends

MODULE: Any = SimpleNamespace()


def state() -> tuple[bool, str]:
    return torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    before, deterministic = state(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    assert state() == before == (False, "highest")


def trainer(folder: Path, widths: tuple[int, ...], precision: str = "bf16-mixed", device: str = "cuda") -> Any:
    for number, width in enumerate(widths):
        noise(folder / f"{number}.png", width, 64)
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, precision=precision, datamodule=opened(folder, side=128))


@pytest.mark.parametrize(
    ("widths", "precision", "benchmark", "expected"),
    [
        ((64, 64), "bf16-mixed", None, (True, "highest")),
        ((64, 192), "bf16-mixed", None, (False, "highest")),
        ((64, 64), "bf16-mixed", False, (False, "highest")),
        ((64, 192), "32-true", None, (False, "high")),
        ((64, 64), "32-true", None, (True, "high")),
    ],
)
def test_settings_during_and_after_a_training(
    widths: tuple[int, ...], precision: str, benchmark: bool | None, expected: tuple[bool, str], tmp_path: Path
) -> None:
    fake = trainer(tmp_path, widths, precision)
    callback = CudaBackends(benchmark)
    callback.on_train_start(fake, MODULE)
    assert state() == expected
    callback.on_train_end(fake, MODULE)
    callback.on_train_start(fake, MODULE)
    callback.on_exception(fake, MODULE, cast(Any, KeyboardInterrupt()))


def test_nothing_changes_with_deterministic_algorithms_or_on_a_cpu(tmp_path: Path) -> None:
    callback = CudaBackends(None)
    callback.on_train_start(trainer(tmp_path, (64,), "32-true", device="cpu"), MODULE)
    assert state() == (False, "highest")
    torch.use_deterministic_algorithms(True)
    callback.on_train_start(trainer(tmp_path, (64,), "32-true"), MODULE)
    assert state() == (False, "highest")


def test_settings_are_restored_when_the_last_run_of_a_shared_backbone_ends(tmp_path: Path) -> None:
    first, second = CudaBackends(None), CudaBackends(None)
    first.on_train_start(trainer(tmp_path / "one", (64, 64), "32-true"), MODULE)
    assert state() == (True, "high")
    second.on_train_start(trainer(tmp_path / "two", (64, 192), "32-true"), MODULE)
    assert state() == (False, "high"), "the second run has images of two sizes"
    second.on_train_end(MODULE, MODULE)
    assert state() == (True, "high")
    second.on_exception(MODULE, MODULE, cast(Any, KeyboardInterrupt()))
    assert state() == (True, "high")
    first.on_train_end(MODULE, MODULE)
