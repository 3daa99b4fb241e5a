"""Measured commands: sdtune, diffusers' scripts and kohya's train_network.py, with the same images and weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

CAPTION = "a photo of a cat"

KOHYA_SUBSET = "kohya/1_cat"
"""Folder of images for kohya's scripts: number of repeats, underscore, name."""


@dataclass(frozen=True)
class Shape:
    """Backbone (pipeline folder ``weights``), image ``side`` in pixels, and ``batch`` size."""

    name: str
    weights: Path
    side: int
    batch: int = 1


@dataclass(frozen=True)
class Command:
    """Module or script with its arguments, run by the interpreter ``python``."""

    target: str
    arguments: tuple[str, ...]
    python: str = sys.executable


def images(folder: Path, side: int, count: int = 8) -> Path:
    """Folder of images for both trainers: with caption files for sdtune, with metadata.jsonl and maps for diffusers."""
    rows = []
    for sub in ("captioned", "bare", "listed", "paired", KOHYA_SUBSET):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise = Image.effect_noise((side, side), 60 + 10 * number)
        image = Image.merge("RGB", (noise, noise.rotate(180), noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
        for sub in ("captioned", "bare", "listed", "paired", KOHYA_SUBSET):
            image.save(folder / sub / f"{number}.png")
        image.convert("L").point(lambda value: 255 * (value > 140)).save(folder / "paired" / f"{number}-map.png")
        for sub in ("captioned", KOHYA_SUBSET):
            (folder / sub / f"{number}.txt").write_text(CAPTION, encoding="utf-8")
        rows.append({"file_name": f"{number}.png", "text": CAPTION})
    _write_metadata(folder / "listed", rows)
    _write_metadata(
        folder / "paired", [{**r, "conditioning_image_file_name": f"{i}-map.png"} for i, r in enumerate(rows)]
    )
    return folder


def _write_metadata(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ours(method: str, shape: Shape, data: Path, run: Path, precision: str, *more: str) -> Command:
    """``sdtune train`` with the defaults of diffusers' scripts: AdamW, constant learning rate, no EMA."""
    method_arguments = {
        "lora": ["method.rank=4", f"data.path={data / 'captioned'}"],
        "textual_inversion": [
            'new_tokens=[{token: "<new>", init: cat}]',
            "data.templates=object",
            'data.prompt="<new>"',
            f"data.path={data / 'bare'}",
        ],
        "dreambooth": [
            "data.class_prompt=a photo of a dog",
            f"data.class_path={data / 'bare'}",
            f"data.path={data / 'captioned'}",
        ],
        "full": [f"data.path={data / 'captioned'}"],
        "controlnet": ["data/control=canny", f"data.path={data / 'captioned'}"],
    }[method]
    arguments = [
        f"method={method}",
        f"backbone.path={shape.weights}",
        *(["backbone.prediction_type=null"] if shape.name == "pocket" else []),
        "data=folder",
        f"data.batch_size={shape.batch}",
        f"data.resolution={shape.side}",
        "hardware=cpu",
        f"hardware.precision={precision}",
        "trainer.max_steps=1000",
        "lr_schedule.warmup_steps=0",
        "callbacks.samples=null",
        "evaluation=none",
        f"hydra.run.dir={run}",
    ]
    return Command("sdtune", ("train", *arguments, *method_arguments, *more))


SCRIPTS = {
    "lora": "text_to_image/train_text_to_image_lora.py",
    "textual_inversion": "textual_inversion/textual_inversion.py",
    "dreambooth": "dreambooth/train_dreambooth.py",
    "full": "text_to_image/train_text_to_image.py",
    "controlnet": "controlnet/train_controlnet.py",
}
"""Path of each script in diffusers' folder ``examples``."""

DOCUMENTED = {"full": ("--gradient_checkpointing",)}
"""Flags in a script's README that cost time; ``--use_ema`` is omitted, because it does not fit in 24 GB."""

BEST = {"dreambooth": ("--pre_compute_text_embeddings", "--set_grads_to_none"), "controlnet": ("--set_grads_to_none",)}
"""Flags that make a script faster on a CPU without changing its result; flags for GPUs are omitted."""


def peer(examples: Path, method: str, shape: Shape, data: Path, run: Path, precision: str, *more: str) -> Command:
    """diffusers' script for ``method``, with its README's arguments except resolution and gradient accumulation."""
    method_arguments = {
        "lora": [
            f"--train_data_dir={data / 'listed'}", "--caption_column=text", "--random_flip", "--learning_rate=1e-04",
            "--seed=42",
        ],
        "textual_inversion": [
            f"--train_data_dir={data / 'bare'}", "--learnable_property=object", "--placeholder_token=<new>",
            "--initializer_token=cat", "--learning_rate=5.0e-04",
        ],
        "dreambooth": [
            f"--instance_data_dir={data / 'bare'}", f"--class_data_dir={data / 'bare'}", "--with_prior_preservation",
            "--prior_loss_weight=1.0", "--instance_prompt=a photo of sks dog", "--class_prompt=a photo of dog",
            "--num_class_images=8", "--learning_rate=5e-6",
        ],
        "full": [
            f"--train_data_dir={data / 'listed'}", "--caption_column=text", "--center_crop", "--random_flip",
            "--learning_rate=1e-05", "--max_grad_norm=1",
        ],
        "controlnet": [f"--train_data_dir={data / 'paired'}", "--caption_column=text", "--learning_rate=1e-5"],
    }[method]  # fmt: skip
    arguments = [
        f"--pretrained_model_name_or_path={shape.weights}",
        f"--resolution={shape.side}",
        f"--train_batch_size={shape.batch}",
        "--max_train_steps=1000",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        f"--output_dir={run}",
        f"--mixed_precision={'bf16' if precision == 'bf16-mixed' else 'no'}",
    ]
    return Command(str(examples / SCRIPTS[method]), (*arguments, *method_arguments, *more))


def kohya(checkout: Path, python: Path, shape: Shape, data: Path, run: Path, precision: str) -> Command:
    """``train_network.py`` of kohya's sd-scripts: LoRA of the UNet, with cached latents and its default optimizer.

    It has no cache of text embeddings for SD 1.5. Its tokenizer is that of the hub id below, read from a folder.
    """
    tokenizers = data / "kohya-tokenizers"
    target = tokenizers / "openai_clip-vit-large-patch14"
    if not target.is_dir():
        shutil.copytree(shape.weights / "tokenizer", target)
    arguments = [
        f"--pretrained_model_name_or_path={shape.weights}",
        f"--tokenizer_cache_dir={tokenizers}",
        f"--train_data_dir={(data / KOHYA_SUBSET).parent}",
        "--caption_extension=.txt",
        f"--resolution={shape.side}",
        f"--train_batch_size={shape.batch}",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--network_train_unet_only",
        "--learning_rate=1e-4",
        "--optimizer_type=AdamW",
        "--lr_scheduler=constant",
        "--max_train_steps=1000",
        "--cache_latents",
        "--sdpa",
        "--max_data_loader_n_workers=0",
        "--seed=42",
        f"--mixed_precision={'bf16' if precision == 'bf16-mixed' else 'no'}",
        f"--output_dir={run}",
    ]
    return Command(str(checkout / "train_network.py"), tuple(arguments), str(python))
