"""What the frozen parts of a backbone make of pictures, captions and class prompts, for the data to keep."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sdtune.backbone.backbone import HALVES
from sdtune.data.pictures import Encoders, PictureData, at_once
from sdtune.paths import cache_folder
from sdtune.sampling import Request, Sampling, generate

if TYPE_CHECKING:
    from sdtune.methods.base import Adapter


def drawn_at_once(side: int) -> int:
    """How many class pictures of ``side`` x ``side`` pixels are drawn at once: four of 512, at most 64."""
    return at_once(4 * 512 * 512, side, side)


def prepare(adapter: Adapter, data: PictureData) -> None:
    """Read ``data`` and fill its caches, each process a share of them."""
    for fill in (data.draw_class, data.prepare):
        fill(encoders(adapter))
        adapter.trainer.strategy.barrier("caches")
        if adapter.trainer.num_nodes > 1:
            # Nodes that share no cache folder lack the others' entries; where they do, nothing is missing.
            fill(replace(encoders(adapter), rank=0, processes=1))


def encoders(adapter: Adapter) -> Encoders:
    """The encoders that data may cache, None where a part is trained, and the model before training."""
    backbone, source, trainer = adapter.backbone, adapter.source, adapter.trainer

    def images(pictures: Tensor) -> Tensor:
        return backbone.encode_images(pictures.to(adapter.device))

    def text(prompts: Sequence[str]) -> Tensor:
        return adapter.encode_text(prompts).float()

    side = trainer.datamodule.resolution  # type: ignore[attr-defined]

    def draw(wanted: Sequence[tuple[str, int]]) -> Iterator[np.ndarray]:
        # Not the weights at hand: a resumed run's are not those before training any more.
        fresh = source.load(adapter.seed, HALVES.get(precision))
        fresh.halve_frozen(precision)
        fresh.to(adapter.device).suit(adapter.device)
        settings = Sampling(guidance=source.guidance, width=side, height=side, batch_size=drawn_at_once(side))
        with adapter.autocast():
            yield from generate(fresh, [Request(prompt, seed) for prompt, seed in wanted], settings)

    frozen_vae, frozen_text = not adapter.open("vae"), not adapter.open("text_encoder")
    precision = str(trainer.precision)
    return Encoders(
        images=images if frozen_vae else None,
        images_hash=source.encoder_key("vae", "32-true") if frozen_vae else "",
        text=text if frozen_text else None,
        # The text encoder's precision follows the run's, so states of one are not those of another.
        text_hash=source.encoder_key("text_encoder", precision) if frozen_text else "",
        draw=draw,
        draw_hash=hashlib.sha256(f"{source.drawing_key()}/{precision}/{source.guidance}/{side}".encode()).hexdigest()[
            :32
        ],
        cache=cache_folder(),
        device=adapter.device,
        rank=trainer.global_rank,
        processes=trainer.world_size,
    )
