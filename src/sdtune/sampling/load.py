"""Load a backbone that only generates images."""

from __future__ import annotations

from pathlib import Path

import torch

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.quantization import quantize
from sdtune.progress import phase


def load_to_generate(
    source: Pretrained, device: torch.device, dtype: torch.dtype | None, *, vae_tiling: bool = False, seed: int = 0
) -> Backbone:
    """Load ``source`` on ``device`` to generate images, as :func:`place_to_generate` places it."""
    with phase(f"Loading {Path(source.path).name}"):
        backbone = source.load(seed, dtype)
    if source.quantize is not None and backbone.pair_executor is None:
        if dtype is not None:  # text encoders are loaded in float32
            for encoder in backbone.trainable_encoders.values():
                encoder.to(dtype)
        quantize(backbone, source.quantize)
    return place_to_generate(backbone, device, dtype, vae_tiling=vae_tiling)


def place_to_generate(
    backbone: Backbone, device: torch.device, dtype: torch.dtype | None, *, vae_tiling: bool = False
) -> Backbone:
    """Move ``backbone`` to ``device``, to generate images.

    The text encoders of a device other than the CPU stay in main memory; :func:`sdtune.sampling.loop.generate` moves
    them for as long as it encodes prompts. The weights of a backbone that other runs share stay as they are.

    Args:
        dtype: dtype of the denoiser and the text encoders; None: unchanged. The VAE stays in float32, because some VAE
            decoders overflow in half precision.
        vae_tiling: decode large images in tiles.
    """
    encoders = list(backbone.encoders.values())
    is_shared = backbone.pair_executor is not None
    for module in backbone.children():
        if dtype is not None and not is_shared and module is not backbone.vae:
            module.to(dtype)
        if is_shared or module not in encoders:
            module.to(device)
    if is_shared or device.type == "cpu":
        backbone.to(device)
    backbone.prepare_for_device(device)
    if vae_tiling:
        backbone.decode_in_tiles()
    return backbone
