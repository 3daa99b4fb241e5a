"""Two steps of each recipe for real Stable Diffusion at its true shapes, with random weights on a CPU.

Run by ``make real-recipes``. Uses the command in each recipe with ``trainer.max_steps=2``, without samples and
evaluation; :func:`two_steps` reduces settings that do not fit in 24 GB. Updates recipes.json next to this file after
each recipe.
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
    """Arguments of ``sdtune train`` in the recipe's command, with existing paths."""
    arguments = shlex.split(recipe.read_text(encoding="utf-8").splitlines()[1])[3:]
    paths = {"backbone.path=FOLDER": f"backbone.path={backbone}", "data.path=DIR": f"data.path={shown}"}
    class_images = ["data.class_images=1"] if "dreambooth" in recipe.stem else []
    return [*(paths.get(argument, argument) for argument in arguments), *LESS, *class_images]


def two_steps(recipe: Path, folder: Path, shown: Path) -> dict[str, Any]:
    """Train the recipe for two steps; returns losses, trained parameters, peak memory and times."""
    kind = "sdxl" if recipe.stem.startswith("sdxl") else "sd15"
    random_pipeline(folder / kind, kind)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    # Two recipes do not fit in 24 GB unchanged. Attention on a CPU stores its scores, which are the largest tensors of
    # SDXL at 1024 pixels; a full UNet in float32 with AdamW and EMA needs 17 GB alone.
    reductions = ["data.resolution=512"] if kind == "sdxl" else []
    reductions += ["hardware.gradient_checkpointing=true", "callbacks.ema=null"] if "full" in recipe.stem else []
    command = [sys.executable, "-m", "sdtune", "train", *words(recipe, folder / kind, shown), *reductions]
    start = time.monotonic()
    subprocess.run([*command, f"hydra.run.dir={run}"], check=True)
    seconds = time.monotonic() - start
    figures: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    with (run / "metrics.csv").open(newline="") as handle:
        losses = [float(row["loss"]) for row in csv.DictReader(handle)]
    artifact_files = sorted(file.name for file in (run / "artifact").rglob("*.safetensors"))
    shutil.rmtree(run)
    if len(losses) != 2 or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"{recipe.stem}: expected two finite losses, got {losses}")
    return {
        "losses": losses,
        "trained": figures["trainable_parameters"],
        "peak_memory_bytes": figures["peak_memory_bytes"],
        "median_step_seconds": figures["median_step_seconds"],
        "seconds": seconds,
        "artifact": artifact_files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/real-shapes"), help="folder for weights and runs")
    parser.add_argument("recipes", nargs="*", help="recipe names; default: all recipes")
    arguments = parser.parse_args()
    shown = images(arguments.folder / "images", (1152, 1024))
    # data.prompt has the new token and is used only for images without a caption.
    bare = images(arguments.folder / "bare", (1152, 1024), None)
    target = HERE / "recipes.json"
    results: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    for recipe in RECIPES:
        if not arguments.recipes or recipe.stem in arguments.recipes:
            results[recipe.stem] = two_steps(
                recipe, arguments.folder, bare if "textual_inversion" in recipe.stem else shown
            )
            write_json(target, results)


if __name__ == "__main__":
    main()
