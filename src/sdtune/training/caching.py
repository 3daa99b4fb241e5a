"""Fill the caches of latents and text states, and draw class images, before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.data.datamodule import Encoders, ImageDataModule, at_once
from sdtune.hardware.precision import HALVES
from sdtune.paths import cache_folder
from sdtune.sampling.loop import Request, Sampling, generate


def drawn_at_once(side: int) -> int:
    """How many class images of ``side`` x ``side`` pixels are drawn at once: four of 512, at most 64."""
    return at_once(4 * 512 * 512, side, side)


@dataclass(frozen=True)
class CachedParts:
    """The parts of a run that its caches are filled with.

    Args:
        source, seed, device, precision: the run's own.
        encode_text: prompts to text states, with the run's gradients and autocast.
        autocast: the run's.
        frozen_vae, frozen_text: whether nothing of the VAE, of the text encoders is trained.
    """

    backbone: Backbone
    source: Pretrained
    seed: int
    device: torch.device
    precision: str
    encode_text: Callable[[Sequence[str]], Tensor]
    autocast: Callable[[], AbstractContextManager[object]]
    frozen_vae: bool
    frozen_text: bool


def fill_caches(parts: CachedParts, data: ImageDataModule, trainer: pl.Trainer) -> None:
    """Have ``data`` draw its class images and fill its caches, each process of ``trainer`` a share of them."""
    assert data.resolution is not None
    whole = encoders(parts, data.resolution)
    own = replace(whole, rank=trainer.global_rank, processes=trainer.world_size)
    for fill in (data.draw_class, data.prepare):
        fill(own)
        trainer.strategy.barrier("caches")
        if trainer.num_nodes > 1:
            # Nodes that share no cache folder lack the others' entries; where they do, nothing is missing.
            fill(whole)


def encoders(parts: CachedParts, side: int) -> Encoders:
    """The encoders that data may cache, None where a part is trained, and the model before training.

    Args:
        side: of a class image, in pixels.
    """
    backbone, source, precision = parts.backbone, parts.source, parts.precision

    def encode_images(images: Tensor) -> Tensor:
        return backbone.encode_images(images.to(parts.device))

    def encode_text(prompts: Sequence[str]) -> Tensor:
        return parts.encode_text(prompts).float()

    def draw(wanted: Sequence[tuple[str, int]]) -> Iterator[np.ndarray]:
        # Not the weights at hand: a resumed run's are not those before training any more.
        fresh = source.load(parts.seed, HALVES.get(precision))
        fresh.cast_frozen(precision)
        fresh.to(parts.device).prepare_for_device(parts.device)
        settings = Sampling(guidance=source.guidance, width=side, height=side, batch_size=drawn_at_once(side))
        with parts.autocast():
            yield from generate(fresh, [Request(prompt, seed) for prompt, seed in wanted], settings)

    drawn_by = hashlib.sha256(f"{source.drawing_key()}/{precision}/{source.guidance}/{side}".encode())
    return Encoders(
        images=encode_images if parts.frozen_vae else None,
        images_hash=source.encoder_key("vae", "32-true") if parts.frozen_vae else "",
        text=encode_text if parts.frozen_text else None,
        # The text encoder's precision follows the run's, so states of one are not those of another.
        text_hash=source.encoder_key("text_encoder", precision) if parts.frozen_text else "",
        draw=draw,
        draw_hash=drawn_by.hexdigest()[:32],
        cache=cache_folder(),
        device=parts.device,
    )
