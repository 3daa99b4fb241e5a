"""DINO metric: image similarity to reference images by DINO or DINOv2 embeddings."""

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
from sdtune.progress import track


def check_dino(name: str) -> None:
    """Raise UserError unless ``name`` is a folder with a DINO or DINOv2 model; loads no weights."""
    # In transformers the original DINO has the model type of a plain ViT.
    check_named_model("dino", name, "DINO or DINOv2", ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit"))


class Dino:
    """DINO or DINOv2 model (Caron et al. 2021; Oquab et al. 2023) from a local folder; embeds images.

    An embedding is the class token, normalized to unit length, so dot products are cosine similarities in [-1, 1].

    Raises:
        UserError: the folder has no image model that transformers can load.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        folder = Path(path).expanduser()
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = shorten(str(error), 200, placeholder=" ...")
            raise UserError(
                f"cannot load {path} as an image model ({reason})",
                key="evaluation.dino",
                remedy="name a local folder with a DINO or DINOv2 model",
            ) from error
        self.model, self.device = model.eval().requires_grad_(False).to(device), device

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embeddings float32 [N, D] of uint8 [H, W, 3] images."""
        embeddings = []
        for first in track("Embedding images with DINO", range(0, len(images), 64), -(-len(images) // 64)):
            batch = [Image.fromarray(p) for p in images[first : first + 64]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
            embeddings.append(F.normalize(self.model(**inputs).last_hidden_state[:, 0].float(), dim=-1))
        return torch.cat(embeddings)


def dino_image(dino: Dino, images: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """DINO: mean cosine similarity of all image-reference pairs, in [-1, 1] (Ruiz et al. 2023, section 4.2)."""
    return float((dino.images(images) @ dino.images(references).T).mean())
