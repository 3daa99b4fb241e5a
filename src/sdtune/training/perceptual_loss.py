"""Perceptual loss with a frozen CLIP image encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtune.formats.clip_pixels import pixel_statistics


class PerceptualLoss:
    """Perceptual distance: mean squared distance of normalized features over all layers of a CLIP image encoder.

    This is LPIPS (Zhang et al. 2018, eq. 1) with all channel weights 1: no weights calibrated on human judgments exist
    for this encoder.

    Args:
        path: folder of a CLIP model in the transformers layout.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import CLIPVisionModel

        folder = Path(path).expanduser()
        model = CLIPVisionModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self.model = model.eval().requires_grad_(False).to(device)
        self.side = int(model.config.image_size)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in pixel_statistics(folder))

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        resized = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        out = self.model(pixel_values=((resized + 1) / 2 - self.mean) / self.std, output_hidden_states=True)
        return tuple(F.normalize(state, dim=-1) for state in out.hidden_states)

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Perceptual loss, a scalar, of ``images`` and ``truth``, float32 [B, 3, H, W] in [-1, 1].

        Gradients flow to ``images`` only.
        """
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                target_features = self._features(truth)
            features = self._features(images)
            distances = [(a - b).square().sum(-1).mean() for a, b in zip(features, target_features, strict=True)]
            return torch.stack(distances).mean()
