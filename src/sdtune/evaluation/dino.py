"""DINO and DINOv2 metrics: likeness of images without text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdtune.errors import UserError
from sdtune.evaluation.model_names import check_named_model


def check_dino(name: str) -> None:
    """UserError where ``name`` is no folder with a DINO or DINOv2; reads its config alone."""
    # The first DINO is a plain ViT in transformers.
    check_named_model("dino", name, "DINO or DINOv2", ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit"))


class Dino:
    """A model of that family (Caron et al. 2021; Oquab et al. 2023) in a local folder.

    Embeddings are the class token's, of unit length, so products are cosines in [-1, 1].
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        folder = Path(path).expanduser()
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = shorten(str(error), 200, placeholder=" ...")
            raise UserError(f"{path} holds no model of images ({reason})", key="evaluation.dino") from error
        self.model, self.device = model.eval().requires_grad_(False).to(device), device

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embeddings float32 [N, D] of uint8 [H, W, 3] images."""
        rows = []
        for first in range(0, len(images), 64):
            batch = [Image.fromarray(p) for p in images[first : first + 64]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
            rows.append(F.normalize(self.model(**inputs).last_hidden_state[:, 0].float(), dim=-1))
        return torch.cat(rows)


def dino_image(dino: Dino, images: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """Mean cosine between each image and each reference, in [-1, 1] (DINO of Ruiz et al. 2023, section 4.2)."""
    return float((dino.images(images) @ dino.images(references).T).mean())
