"""Two steps of each recipe for real Stable Diffusion at its true shapes, with random weights on a CPU.

``make real-recipes``. The recipe's own command, as it stands but for what 24 GB do not hold (:func:`two_steps`), with
``trainer.max_steps=2``, nothing drawn, nothing measured. Writes recipes.json beside this file, a recipe at a time.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.real_shapes.measure import images, random_pipeline
from sdtune.files import write_json

HERE = Path(__file__).parent
RECIPES = [*sorted(HERE.parent.glob("sd15_*.yaml")), HERE.parent / "sdxl_lora.yaml"]
LESS = (
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "callbacks.samples=null",
    "evaluation=none",
    "hardware=cpu",
)


def words(recipe: Path, backbone: Path, shown: Path) -> list[str]:
    """The recipe's own command behind ``sdtune train``, with places that exist."""
    found = shlex.split(recipe.read_text().splitlines()[1])[3:]
    places = {"backbone.path=FOLDER": f"backbone.path={backbone}", "data.path=DIR": f"data.path={shown}"}
    drawn = ["data.class_images=1"] if "dreambooth" in recipe.stem else []
    return [*(places.get(word, word) for word in found), *LESS, *drawn]


def two_steps(recipe: Path, folder: Path, shown: Path) -> dict[str, Any]:
    """What the two steps took."""
    kind = "sdxl" if recipe.stem.startswith("sdxl") else "sd15"
    random_pipeline(folder / kind, kind)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    # Neither fits 24 GB as it stands: a CPU's attention keeps its scores, which at 1024 pixels are SDXL's largest
    # tensors, and a whole UNet in float32 with AdamW and an average is 17 GB by itself.
    less = ["data.resolution=512"] if kind == "sdxl" else []
    less += ["hardware.gradient_checkpointing=true", "callbacks.ema=null"] if "full" in recipe.stem else []
    command = [sys.executable, "-m", "sdtune", "train", *words(recipe, folder / kind, shown), *less]
    began = time.monotonic()
    subprocess.run([*command, f"hydra.run.dir={run}"], check=True)
    took = time.monotonic() - began
    figures: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    with (run / "metrics.csv").open(newline="") as handle:
        losses = [float(row["loss"]) for row in csv.DictReader(handle)]
    kinds = sorted(file.name for file in (run / "artifact").rglob("*.safetensors"))
    shutil.rmtree(run)
    if len(losses) != 2 or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"{recipe.stem}: losses {losses}")
    return {
        "losses": losses,
        "trained": figures["trainable_parameters"],
        "peak_memory_bytes": figures["peak_memory_bytes"],
        "median_step_seconds": figures["median_step_seconds"],
        "seconds": took,
        "artifact": kinds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/real-shapes"), help="for weights and runs")
    parser.add_argument("recipes", nargs="*", help="names; all if there is none")
    arguments = parser.parse_args()
    shown, bare = (images(arguments.folder / name, (1152, 1024)) for name in ("images", "bare"))
    for caption in bare.glob("*.txt"):
        caption.unlink()  # a new word stands in data.prompt, which captions what has no caption of its own
    target = HERE / "recipes.json"
    found: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {}
    for recipe in RECIPES:
        if not arguments.recipes or recipe.stem in arguments.recipes:
            found[recipe.stem] = two_steps(
                recipe, arguments.folder, bare if "textual_inversion" in recipe.stem else shown
            )
            write_json(target, found)


if __name__ == "__main__":
    main()
