"""Quality of pocket: ``python -m experiments.pocket.quality [--seed N] [--out DIR] [--pipeline DIR]``.

Measures the accuracy of images of held-out combinations with the evaluation classifier, and the PSNR of the VAE on true
renders. Writes ``quality.json`` and ``quality.png`` (the first images) to DIR.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont

from sdtune import pocket
from sdtune.backbone import Pretrained
from sdtune.files import replacing, write_text
from sdtune.pocket.evaluation.classifier import Classifier, background, ceilings, load_classifier, reconstruct
from sdtune.pocket.evaluation.psnr import psnr
from sdtune.pocket.world.captions import full_caption
from sdtune.pocket.world.scenes import SIDE, Scene, draw_scene, held_out_scenes
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import generate_images

PROMPTS = 512
STEPS = 30
GUIDANCE = 3.0

_BATCH = 64
_GRID_SIDE = 8
_CELL = 2 * SIDE
_CAPTION = 28  # pixels below an image, for two lines


def _generate(folder: Path, prompts: list[str], seed: int, steps: int = STEPS) -> np.ndarray:
    """Generate one image per prompt with the pipeline in ``folder``: uint8 [N, 64, 64, 3]."""
    backbone = Pretrained(str(folder)).load()
    backbone.prepare_for_device(backbone.device)
    requests = [Request(prompt, seed * 100_003 + k) for k, prompt in enumerate(prompts)]
    sampling = Sampling(steps=steps, guidance=GUIDANCE, batch_size=_BATCH)
    return np.stack(generate_images(backbone, requests, sampling))


def agreement(predicted: list[str], truth: list[str]) -> float:
    """Fraction of predictions that are equal to the ground truth."""
    return sum(a == b for a, b in zip(predicted, truth, strict=True)) / len(truth)


def measure(
    images: np.ndarray, scenes: list[Scene], classifier: Classifier, vae: AutoencoderKL, seed: int
) -> dict[str, float]:
    """Metrics for ``quality.json`` of ``images`` (uint8 [N, 64, 64, 3]), generated from the captions of ``scenes``."""
    readings = classifier.read(images)
    renders = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    return {
        "background_accuracy": agreement(background(images), [scene.background for scene in scenes]),
        "object_accuracy": agreement(readings.object, [scene.thing for scene in scenes]),
        "size_accuracy": agreement(readings.size, [scene.size for scene in scenes]),
        "vae_psnr_db": float(psnr(reconstruct(vae, renders), renders).mean()),
        **ceilings(classifier, vae, seed),
        "prompts": len(scenes),
        "seed": seed,
    }


def grid(images: np.ndarray, scenes: list[Scene]) -> Image.Image:
    """Grid of ``images`` (uint8 [N, 64, 64, 3]) at twice their size, eight per row, each above its description."""
    rows = -(-len(images) // _GRID_SIDE)
    sheet = Image.new("RGB", (_GRID_SIDE * _CELL, rows * (_CELL + _CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for k, (image, scene) in enumerate(zip(images, scenes, strict=True)):
        x, y = k % _GRID_SIDE * _CELL, k // _GRID_SIDE * (_CELL + _CAPTION)
        sheet.paste(Image.fromarray(image).resize((_CELL, _CELL), Image.Resampling.NEAREST), (x, y))
        label = f"{scene.size} {scene.thing}\n{scene.background}, {scene.place}"
        pen.multiline_text((x + 3, y + _CELL), label, "black", font, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pocket.quality", description="Measure pocket's quality."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("experiments/pocket"), help="output folder")
    parser.add_argument(
        "--pipeline", type=Path, default=pocket.path(), help="pipeline folder; default: the shipped pipeline"
    )
    arguments = parser.parse_args()
    # Load the classifier first, so that a missing one is reported before minutes of sampling.
    classifier = load_classifier()
    vae = AutoencoderKL.from_pretrained(arguments.pipeline, subfolder="vae", local_files_only=True).eval()
    scenes = held_out_scenes(arguments.seed, PROMPTS)
    images = _generate(arguments.pipeline, [full_caption(scene) for scene in scenes], arguments.seed)
    figures = measure(images, scenes, classifier, vae, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    grid_count = _GRID_SIDE**2
    with replacing(arguments.out / "quality.png") as partial:
        grid(images[:grid_count], scenes[:grid_count]).save(partial, format="PNG")
    text = json.dumps(figures, indent=2)
    write_text(arguments.out / "quality.json", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
