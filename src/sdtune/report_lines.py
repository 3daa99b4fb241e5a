"""What a run says before it trains and after: short, plain, and with the commands that come next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from sdtune.backbone import Pretrained
from sdtune.data import PictureData


def before(data: PictureData, source: Pretrained, trainer: pl.Trainer) -> list[str]:
    """The data as it will be seen."""
    from transformers import CLIPTokenizer

    buckets = data.buckets(data.train)
    pictures = len(data.train)
    seen = sum(len(entries) for entries in buckets.values())
    sizes = ", ".join(f"{w}x{h} ({len(set(entries))})" for (w, h), entries in buckets.items())
    steps = data.order().steps_per_epoch
    lines = [
        f"data: {pictures} pictures, {seen} with repeats, {len(data.held_out)} held out; buckets {sizes}",
        f"order: {steps} step(s) an epoch at batch size {data.batch_size}; {trainer.max_steps} steps are"
        f" {trainer.max_steps / steps:.1f} epochs",
    ]
    tokenizer = CLIPTokenizer.from_pretrained(source.folder() / "tokenizer", local_files_only=True)
    captions = list(dict.fromkeys(sample.caption for sample in data.train))[:10_000]
    longest = max(captions, key=lambda caption: len(tokenizer(caption).input_ids))
    length, limit = len(tokenizer(longest).input_ids), source.facts.max_tokens
    lines.append(f"captions: {len(captions)} different ones; the longest has {length} tokens of {limit}")
    if length > limit:
        lines.append(f"WARNING: captions above {limit} tokens are cut; the longest is {longest!r}")
    return lines


def after(folder: Path, name: str, figures: dict[str, Any]) -> list[str]:
    """What was made, and the command that samples with it."""
    lines = [f"figures: {folder / 'metrics.json'}"]
    for picture in ("before_after.png",):
        if (folder / "samples" / picture).exists():
            lines.append(f"before and after: {folder / 'samples' / picture}")
    lora = folder / "artifact" / f"{name}.safetensors"
    if lora.exists():
        lines.append(f"LoRA for ComfyUI, A1111 and kohya's tools: {lora}")
        lines.append(f"LoRA for diffusers: {folder / 'artifact' / 'pytorch_lora_weights.safetensors'}")
        lines.append(f"sample with it: sdtune sample prompt='...' adapters=[{{path:{lora},strength:0.8}}]")
    elif (folder / "artifact" / name).is_dir():
        lines.append(f"pipeline folder for diffusers: {folder / 'artifact' / name}")
        lines.append(f"sample with it: sdtune sample prompt='...' backbone.path={folder / 'artifact' / name}")
    return lines
