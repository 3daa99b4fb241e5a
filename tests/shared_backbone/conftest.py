from __future__ import annotations

from pathlib import Path

import pytest

from running import arguments


@pytest.fixture
def settings(tiny: Path, images: Path, tmp_path: Path) -> list[str]:
    overrides = arguments(tiny, images, tmp_path, "name=mine", "trainer.max_steps=3")
    return ["-m", *(a for a in overrides if not a.startswith(("hydra.run.dir", "callbacks.samples")))]
