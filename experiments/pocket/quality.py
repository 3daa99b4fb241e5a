"""Pocket's measured quality: ``python -m experiments.pocket.quality [--seed N] [--out DIR] [--pipeline DIR]``.

Images of combinations that training never drew, sampled from the pipeline and read by the measuring classifier, and
how well the VAE rebuilds true renders. Writes ``quality.json`` and ``quality.png``, the first images, to DIR.
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
from sdtune.evaluation.draw import draw_images
from sdtune.files import replacing, write_text
from sdtune.pocket.evaluation.classifier import Classifier, background, ceilings, load_classifier, reconstruct
from sdtune.pocket.evaluation.psnr import psnr
from sdtune.pocket.world.captions import full_caption
from sdtune.pocket.world.scenes import SIDE, Scene, draw_scene, held_out_scenes
from sdtune.sampling.loop import Request, Sampling

PROMPTS = 512
STEPS = 30
GUIDANCE = 3.0

_BATCH = 64
_GRID_SIDE = 8
_CELL = 2 * SIDE
_CAPTION = 28  # pixels below an image, for two lines


def _generate(folder: Path, prompts: list[str], seed: int, steps: int = STEPS) -> np.ndarray:
    """An image for each prompt, from the pipeline in ``folder``: uint8 [N, 64, 64, 3]."""
    backbone = Pretrained(str(folder)).load()
    backbone.prepare_for_device(backbone.device)
    requests = [Request(prompt, seed * 100_003 + k) for k, prompt in enumerate(prompts)]
    sampling = Sampling(steps=steps, guidance=GUIDANCE, batch_size=_BATCH)
    return np.stack(draw_images(backbone, requests, sampling))


def agreement(said: list[str], truth: list[str]) -> float:
    """Share of the answers that are exactly right."""
    return sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)


def measure(
    images: np.ndarray, scenes: list[Scene], classifier: Classifier, vae: AutoencoderKL, seed: int
) -> dict[str, float]:
    """The metrics of ``quality.json`` for ``images`` (uint8 [N, 64, 64, 3]) made from the captions of ``scenes``."""
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
    """Up to 64 images (uint8 [N, 64, 64, 3]) at twice their size, eight a row, each over what was asked for."""
    rows = -(-len(images) // _GRID_SIDE)
    sheet = Image.new("RGB", (_GRID_SIDE * _CELL, rows * (_CELL + _CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for k, (image, scene) in enumerate(zip(images, scenes, strict=True)):
        x, y = k % _GRID_SIDE * _CELL, k // _GRID_SIDE * (_CELL + _CAPTION)
        sheet.paste(Image.fromarray(image).resize((_CELL, _CELL), Image.Resampling.NEAREST), (x, y))
        words = f"{scene.size} {scene.thing}\n{scene.background}, {scene.place}"
        pen.multiline_text((x + 3, y + _CELL), words, "black", font, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pocket.quality", description="Measure pocket's quality."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("experiments/pocket"), help="folder of the two files")
    parser.add_argument("--pipeline", type=Path, default=pocket.path(), help="pipeline folder (the shipped one)")
    arguments = parser.parse_args()
    # Loaded first, so that a missing classifier is said before minutes of sampling.
    classifier = load_classifier()
    vae = AutoencoderKL.from_pretrained(arguments.pipeline, subfolder="vae", local_files_only=True).eval()
    scenes = held_out_scenes(arguments.seed, PROMPTS)
    images = _generate(arguments.pipeline, [full_caption(scene) for scene in scenes], arguments.seed)
    figures = measure(images, scenes, classifier, vae, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shown = _GRID_SIDE**2
    with replacing(arguments.out / "quality.png") as partial:
        grid(images[:shown], scenes[:shown]).save(partial, format="PNG")
    text = json.dumps(figures, indent=2)
    write_text(arguments.out / "quality.json", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
