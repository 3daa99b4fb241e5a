"""Fill the latent and text caches and generate class images before training."""

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
from sdtune.data.batch_sizes import class_image_batch_size
from sdtune.data.datamodule import CacheInputs, ImageDataModule
from sdtune.hardware.precision import HALVES
from sdtune.paths import cache_folder
from sdtune.sampling.loop import Request, Sampling, can_sample, generate


@dataclass(frozen=True)
class CachedParts:
    """Models and settings of a run that its caches are filled with.

    Args:
        backbone: the loaded backbone; only its VAE is used.
        source: the pipeline that the backbone was loaded from, to load it again.
        seed: seed of the run.
        device: device of the run.
        precision: Lightning's precision of the run, such as ``bf16-mixed``.
        encode_text: converts prompts to text embeddings [B, L, D] under the run's autocast.
        autocast: creates the run's autocast context.
        frozen_vae: whether no parameter of the VAE is trained.
        frozen_text: whether no parameter of the text encoders is trained.
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
    """Generate the class images of ``data`` and fill its caches; the processes of ``trainer`` share the work."""
    assert data.resolution is not None
    all_inputs = cache_inputs(parts, data.resolution)
    rank_inputs = replace(all_inputs, rank=trainer.global_rank, processes=trainer.world_size)
    for fill in (data.generate_class_images, data.prepare):
        fill(rank_inputs)
        trainer.strategy.barrier("caches")
        if trainer.num_nodes > 1:
            # Without a shared cache folder each node lacks the entries of the other nodes; compute them here.
            fill(all_inputs)


def cache_inputs(parts: CachedParts, side: int) -> CacheInputs:
    """Encoders whose outputs may be cached (None for a trained component), and the generator of class images.

    Args:
        side: width and height of a class image in pixels.
    """
    backbone, source, precision = parts.backbone, parts.source, parts.precision

    def encode_images(images: Tensor) -> Tensor:
        return backbone.encode_images(images.to(parts.device))

    def encode_text(prompts: Sequence[str]) -> Tensor:
        return parts.encode_text(prompts).float()

    def generate_class_images(prompts_and_seeds: Sequence[tuple[str, int]]) -> Iterator[np.ndarray]:
        # Load the backbone again: the weights of a resumed run are already trained.
        untrained = source.load(parts.seed, HALVES.get(precision))
        untrained.cast_frozen(precision)
        untrained.to(parts.device).prepare_for_device(parts.device)
        settings = Sampling(
            guidance=source.guidance,
            sampler=None if can_sample(source.facts.scheduler) else "ddim",
            width=side,
            height=side,
            batch_size=class_image_batch_size(side),
        )
        with parts.autocast():
            yield from generate(untrained, [Request(prompt, seed) for prompt, seed in prompts_and_seeds], settings)

    generator_key = hashlib.sha256(f"{source.image_cache_key()}/{precision}/{source.guidance}/{side}".encode())
    return CacheInputs(
        encode_images=encode_images if parts.frozen_vae else None,
        vae_key=source.encoder_cache_key("vae", "32-true") if parts.frozen_vae else "",
        encode_text=encode_text if parts.frozen_text else None,
        # The text encoder uses the run's precision, so embeddings of different precisions differ.
        text_encoder_key=source.encoder_cache_key("text_encoder", precision) if parts.frozen_text else "",
        generate_images=generate_class_images,
        generator_key=generator_key.hexdigest()[:32],
        folder=cache_folder(),
        device=parts.device,
    )
