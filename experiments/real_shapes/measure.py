"""Three training steps of each method at Stable Diffusion 1.5's true shapes, compared with sdtune plan.

Run by ``make real-shapes``. The weights are random and generated once. Each method is a process of ``sdtune train``
on a CPU in bfloat16, which records its own peak memory. Writes results.json and README.md next to this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from sdtune.backbone.families import family_of_folder
from sdtune.backbone.models import from_config
from sdtune.backbone.single_file import included_configs
from sdtune.backbone.vocabulary import END, write_tokenizer
from sdtune.commands.plan import checked_plan, plan_request
from sdtune.files import write_json, write_text
from sdtune.paths import config_folder
from sdtune.planning.memory import SWITCHES, memory
from sdtune.planning.request import count

HERE = Path(__file__).parent
SIZES = ((256, 256), (320, 192))
"""Width and height in pixels; the second is an aspect-ratio bucket of data.resolution=256."""

STEPS = 3

METHODS = {
    "textual_inversion": ['new_tokens=[{token: "<new>", init: cat}]', "data.templates=['<new> {}']"],
    "lora": [],
    "dreambooth": ["data.class_prompt=a photo of a dog"],
    "full": [],
    "controlnet": ["data/control=canny"],
}

_IMPORTS = "import sdtune.commands.train, sdtune.callbacks, sdtune.methods, pytorch_lightning"
_RESIDENT = "print(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1])"


def random_pipeline(folder: Path, kind: str = "sd15", text: torch.dtype = torch.float16) -> None:
    """Write a pipeline with random weights in the shapes of ``kind``: float16, text encoders in dtype ``text``."""
    if (folder / "model_index.json").is_file():
        return
    configs = included_configs(kind)
    assert configs is not None
    torch.manual_seed(0)
    for name in sorted(family_of_folder(configs, "backbone.path").components):
        model = from_config(name, configs)
        model.to(text if name.startswith("text_encoder") else torch.float16).save_pretrained(folder / name)
    shutil.copytree(configs / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    index = json.loads((configs / "model_index.json").read_text(encoding="utf-8"))
    for name in ("tokenizer", "tokenizer_2") if (configs / "text_encoder_2").is_dir() else ("tokenizer",):
        write_tokenizer(folder / name, "!" if name == "tokenizer_2" else END)
        index[name] = ["transformers", "CLIPTokenizer"]
    write_json(folder / "model_index.json", index)  # written last, because it marks the folder as complete


def images(folder: Path, size: tuple[int, int], caption: str | None = "a cat") -> Path:
    """Folder with two colored noise images, with a caption or without."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        noise = Image.effect_noise(size, 80 + 40 * number)
        Image.merge("RGB", (noise, noise.rotate(180), noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT))).save(
            folder / f"{number}.png"
        )
        if caption is not None:
            (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


def planned(method: str, settings: list[str]) -> dict[str, int]:
    """Counts of ``sdtune plan``: trained parameters, bytes of the artifact, bytes of the peak in a step."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("plan", [f"method={method}", *settings], return_hydra_config=True)
        job = checked_plan(config)
    figures = count(plan_request(job))
    step = memory(figures, SWITCHES["plain"], job.accumulation, 1).step
    return {"trained": figures.total.trained, "artifact": figures.artifact, "step": step}


def trained(run: Path, method: str, settings: list[str]) -> dict[str, Any]:
    """Run three steps of ``sdtune train``; returns loss, parameters, artifact size and peak memory.

    From the second step on, the optimizer's state exists while activations are stored.
    """
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "sdtune", "train", f"method={method}", *settings, f"hydra.run.dir={run}"]
    subprocess.run(command, check=True)
    figures: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    with (run / "metrics.csv").open(newline="") as handle:
        losses = [float(row["loss"]) for row in csv.DictReader(handle)]
    shutil.rmtree(run)
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"{method}: losses {losses}, expected {STEPS} finite ones")
    return {
        "trained": figures["trainable_parameters"],
        "artifact": figures["artifact_bytes"],
        "peak": figures["peak_memory_bytes"],
        "loss": losses[0],
    }


def room() -> int:
    """Resident bytes of a process that has imported all modules and loaded no model."""
    code = f"{_IMPORTS}\n{_RESIDENT}"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return int(output.split()[-1]) * 1024


def page(results: dict[str, Any]) -> str:
    """Text of README.md, from results.json."""
    lines = [
        "# Three steps at Stable Diffusion 1.5's true shapes",
        "",
        "`make real-shapes` runs three steps of each method with random weights in SD 1.5's shapes: `sdtune train` on",
        "a CPU, bf16-mixed, one sample (a pair for DreamBooth), AdamW, no gradient checkpointing. The peak is the",
        "resident memory of the process during training,",
        f"minus the {results['room'] / 1024**2:,.0f} MiB of a process that has imported the same modules and loaded no",
        "model. *planned* is the peak that `sdtune plan hardware=cpu` counts for 256x256. The difference is memory",
        "that the allocator keeps after loading, and work space of the kernels. The frozen parts of an artifact are",
        "copied unchanged, here in half precision; the plan assumes float32.",
        "",
        "| method | pixels | trained | artifact, MiB (planned) | peak, MiB | planned | ratio | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["steps"]:
        peak, plan = row["peak"] - results["room"], row["planned"]["step"]
        lines.append(
            f"| {row['method']} | {row['width']}x{row['height']} | {row['trained']:,}"
            f" | {row['artifact'] / 1024**2:,.1f} ({row['planned']['artifact'] / 1024**2:,.1f})"
            f" | {peak / 1024**2:,.0f} | {plan / 1024**2:,.0f} | {peak / plan:.2f} | {row['loss']:.3f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/real-shapes"), help="folder for weights and runs")
    folder = parser.parse_args().folder
    random_pipeline(folder / "sd15")
    rows = []
    for method, overrides in METHODS.items():
        settings = [
            "backbone=sd15", f"backbone.path={folder / 'sd15'}", "data=folder", "data.batch_size=1",
            "data.resolution=256", "hardware=cpu", "hardware.precision=bf16-mixed", f"trainer.max_steps={STEPS}",
            "trainer.log_every_n_steps=1", "lr_schedule.warmup_steps=0", "callbacks.samples=null", "evaluation=none",
            *overrides,
        ]  # fmt: skip
        plan = planned(method, [*settings, f"data.path={folder}"])
        for width, height in SIZES:
            path = images(folder / f"{width}x{height}", (width, height))
            more = [f"data.path={path}"]
            if method == "dreambooth":
                class_images = images(folder / f"class-{width}x{height}", (width, height), None)
                more.append(f"data.class_path={class_images}")
            row = trained(folder / "run", method, [*settings, *more])
            if row["trained"] != plan["trained"]:
                raise RuntimeError(f"{method}: {row['trained']} trained parameters, planned {plan['trained']}")
            rows.append({"method": method, "width": width, "height": height, **row, "planned": plan})
            print(rows[-1], flush=True)
    results = {"room": room(), "steps": rows}
    write_json(HERE / "results.json", results)
    write_text(HERE / "README.md", page(results))
    print(HERE / "README.md")


if __name__ == "__main__":
    main()
