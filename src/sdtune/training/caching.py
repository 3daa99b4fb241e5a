"""Fill the latent and text caches and generate class images before training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.conditioning import Conditioning
from sdtune.data.batch_sizes import class_image_batch_size, text_batch_size
from sdtune.data.datamodule import CacheInputs, ImageDataModule
from sdtune.hardware.precision import HALVES, autocast, generation_dtype
from sdtune.paths import cache_folder
from sdtune.sampling.load import load_to_generate
from sdtune.sampling.loop import Request, Sampling, generate, sampler_of


@dataclass(frozen=True)
class CachedParts:
    """Models and settings of a run that its caches are filled with.

    Args:
        backbone: the loaded backbone, whose encoders are used.
        source: the pipeline that the backbone was loaded from, to load it again.
        seed: seed of the run.
        device: device of the run.
        precision: Lightning's precision of the run, such as ``bf16-mixed``.
        encode_text: converts prompts to text embeddings under the run's autocast.
        vae_tiling: decode large class images in tiles.
        frozen_vae: whether no parameter of the VAE is trained.
        frozen_text: whether no parameter of the text encoders is trained.
        frozen_waiting: whether some text encoders wait in main memory and are not trained.
        encode_conditions: encodes conditions with the VAE; None: they are used as they are.
    """

    backbone: Backbone
    source: Pretrained
    seed: int
    device: torch.device
    precision: str
    encode_text: Callable[[Sequence[str]], Conditioning]
    vae_tiling: bool
    frozen_vae: bool
    frozen_text: bool
    frozen_waiting: bool
    encode_conditions: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None

    @property
    def caches_waiting(self) -> bool:
        """Whether only the text encoders that wait in main memory are cached, because others are trained."""
        return not self.frozen_text and self.frozen_waiting


def generate_class_images(
    source: Pretrained, seed: int, precision: str, vae_tiling: bool, data: ImageDataModule, trainer: pl.Trainer
) -> None:
    """Generate the missing class images of ``data``; the processes of ``trainer`` share the work.

    Called before the training model is moved to the device, which then has room for the model that generates them.
    """
    device = trainer.strategy.root_device
    for part in data.parts.values():
        inputs = _class_image_inputs(source, seed, device, precision, vae_tiling, part.side)
        _fill_together(part.generate_class_images, inputs, trainer)


def fill_caches(parts: CachedParts, data: ImageDataModule, trainer: pl.Trainer) -> None:
    """Generate the class images of ``data`` and fill its caches; the processes of ``trainer`` share the work."""
    for part in data.parts.values():
        _fill_together(part.generate_class_images, _cache_inputs(parts, part.side), trainer)
    _fill_together(data.prepare, _cache_inputs(parts, data.side), trainer)


def _fill_together(fill: Callable[[CacheInputs], None], inputs: CacheInputs, trainer: pl.Trainer) -> None:
    fill(replace(inputs, rank=trainer.global_rank, processes=trainer.world_size))
    trainer.strategy.barrier("caches")
    if trainer.num_nodes > 1:
        # Without a shared cache folder each node lacks the entries of the other nodes; compute them here.
        fill(inputs)


def _class_image_inputs(
    source: Pretrained, seed: int, device: torch.device, precision: str, vae_tiling: bool, side: int
) -> CacheInputs:
    """Generator of class images of ``side`` x ``side`` pixels, without encoders."""
    # On a CPU the images are generated with the run's precision.
    dtype = HALVES.get(precision) if device.type == "cpu" else generation_dtype(device)

    def generate_images(prompts_and_seeds: Sequence[tuple[str, int]]) -> Iterator[np.ndarray]:
        # Load the backbone again: the weights of a resumed run are already trained.
        untrained = load_to_generate(source, device, dtype, vae_tiling=vae_tiling, seed=seed)
        settings = Sampling(
            guidance=source.guidance,
            sampler=sampler_of(source.facts),
            width=side,
            height=side,
            batch_size=class_image_batch_size(side),
        )
        uses_autocast = device.type == "cpu" or untrained.denoiser.dtype == torch.float32
        with autocast(device, precision if uses_autocast else "32-true"):
            yield from generate(untrained, [Request(prompt, seed) for prompt, seed in prompts_and_seeds], settings)

    where = "" if device.type == "cpu" else f"/{device.type}/{dtype}"
    key = hashlib.sha256(f"{source.image_cache_key()}/{precision}/{source.guidance}/{side}{where}".encode())
    return CacheInputs(
        encode_images=None,
        vae_key="",
        encode_text=None,
        text_encoder_key="",
        folder=cache_folder(),
        generate_images=generate_images,
        generator_key=key.hexdigest()[:32],
        device=device,
    )


def _cache_inputs(parts: CachedParts, side: int) -> CacheInputs:
    """Encoders whose outputs may be cached (None for a trained component), and the generator of class images."""
    backbone, source, precision = parts.backbone, parts.source, parts.precision

    # The text embeddings of one prompt are large with T5: 2.7 MB in bfloat16 for 77 + 256 tokens.
    dtype = torch.bfloat16 if source.facts.family.has_t5 else torch.float32

    def encode_images(images: Tensor) -> Tensor:
        return backbone.encode_images(images.to(parts.device))

    def encode_conditions(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert parts.encode_conditions is not None
        return parts.encode_conditions({name: value.to(parts.device) for name, value in conditions.items()})

    def encode_text(prompts: Sequence[str]) -> Conditioning:
        return parts.encode_text(prompts).cast(dtype)

    return replace(
        _class_image_inputs(source, parts.seed, parts.device, precision, parts.vae_tiling, side),
        encode_images=encode_images if parts.frozen_vae else None,
        vae_key=source.encoder_cache_key("vae", "32-true") if parts.frozen_vae else "",
        encode_conditions=encode_conditions if parts.encode_conditions is not None else None,
        encode_text=encode_text if parts.frozen_text else None,
        text_bytes=sum(math.prod(shape) for shape in backbone.text_shapes.values()) * dtype.itemsize,
        text_encoder_key=_text_key(parts),
        encode_waiting=backbone.encode_waiting if parts.caches_waiting else None,
        encoders_on_device=backbone.encoders_on_device,
        text_batch_size=text_batch_size(has_t5=source.facts.family.has_t5),
    )


def _text_key(parts: CachedParts) -> str:
    """Name of the subfolder of the cached text embeddings; empty if they are not cached."""
    if parts.frozen_text:
        # The text encoders use the run's precision, so embeddings of different precisions differ.
        return parts.source.encoder_cache_key("text_encoder", parts.precision)
    return f"waiting-{parts.source.encoder_cache_key('text_encoder', '')}" if parts.caches_waiting else ""
