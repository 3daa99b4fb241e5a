"""Train a sweep over rank and learning rate on pocket, and draw its heat map as a PNG: make docs-images.

    python docs/heat_map.py SWEEP IMAGE

An existing sweep in the folder SWEEP is continued, not repeated. kaleido draws the image; it needs Chrome or Chromium.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sdtune.reporting.charts import heat_map
from sdtune.reporting.collect import collect
from sdtune.reporting.ranking import group_by_setting, metrics

METRIC = "subject_gain"
SWEEP = ["experiment=lora_subject", "sweep=rank_lr", "callbacks.samples=null", "hydra/launcher=joblib"]


def train(folder: Path) -> None:
    """Run what is missing of the sweep."""
    begun = (folder / "multirun.yaml").exists()
    overrides = [f"resume={folder}"] if begun else [*SWEEP, f"hydra.sweep.dir={folder}"]
    subprocess.run([str(Path(sys.executable).parent / "sdtune"), "train", "-m", *overrides], check=True)


def main() -> None:
    folder, image = Path(sys.argv[1]), Path(sys.argv[2])
    train(folder)
    image.parent.mkdir(parents=True, exist_ok=True)
    runs = [run for run in collect(folder) if run.metrics]
    figure = heat_map(group_by_setting(runs), metrics(runs), METRIC)
    assert figure is not None, "a grid over two settings has a heat map"
    figure.layout.updatemenus = ()
    figure.update_layout(title=f"{METRIC} on pocket, one seed")
    figure.write_image(image, width=720, height=420, scale=2)
    print(image)


if __name__ == "__main__":
    main()
