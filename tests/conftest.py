"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import default_signals  # noqa: F401
from families import SD3, SD3_FAMILIES, build_sd3
from pipelines import build_pipeline

torch.set_num_threads(1)  # a tiny model gains nothing from more threads
os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline folder of a tiny backbone."""
    return build_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def sd3_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[SD3, Path]:
    """Pipeline folders of tiny SD 3 models."""
    return {family: build_sd3(tmp_path_factory.mktemp(family), family) for family in SD3_FAMILIES}


@pytest.fixture(scope="session")
def sd35_medium(sd3_folders: dict[SD3, Path]) -> Path:
    """Pipeline folder of a tiny SD 3.5 medium."""
    return sd3_folders["sd35_medium"]


@pytest.fixture(scope="session", autouse=True)
def _temporary_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a temporary cache folder instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five small images with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 36), (40 * i, 255 - 40 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}", encoding="utf-8")
    return folder
