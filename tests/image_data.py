"""Folders of small images, data modules for them, and stubs of the encoders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sdtune.conditioning import Conditioning
from sdtune.data import CacheInputs, Folder, ImageDataModule


def encode(images: Tensor) -> Tensor:
    """Stub of the VAE encoder: [B, 6, H / 8, W / 8], different for every image."""
    return torch.cat([F.avg_pool2d(images, 8), F.max_pool2d(images, 8)], 1)


def text(prompts: list[str]) -> Conditioning:
    return Conditioning(torch.stack([torch.full((3, 2), float(sum(map(ord, prompt)))) for prompt in prompts]))


def encoders(cache: Path, images: Any = encode, vae_key: str = "vae", words: Any = text) -> CacheInputs:
    return CacheInputs(encode_images=images, vae_key=vae_key, encode_text=words, text_encoder_key="text", folder=cache)


def noise(path: Path, width: int, height: int, seed: int = 0, caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def opened(
    path: Path, side: int = 64, steps: int = 6, accumulation: int = 1, start: int = 0, **settings: Any
) -> Folder:
    settings = {"cache_latents": False, "cache_text": False, "prompt": "a dog", "batch_size": 2} | settings
    data = Folder(path=str(path), **settings)
    data.open(side, 8 if side >= 512 else 4)
    data.trainer = SimpleNamespace(
        accumulate_grad_batches=accumulation,
        max_steps=steps,
        global_step=start,
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def batches(data: ImageDataModule) -> list[dict[str, Any]]:
    return list(data.train_dataloader())


def equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )
