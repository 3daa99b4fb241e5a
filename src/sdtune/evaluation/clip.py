"""CLIP metrics: image similarity to reference images (CLIP-I) and to prompts (CLIP-T)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdtune.errors import UserError
from sdtune.evaluation.model_names import check_named_model
from sdtune.formats.clip_pixels import pixel_statistics
from sdtune.paths import pocket_clip, pocket_pipeline
from sdtune.progress import track


def check_clip(name: str) -> None:
    """Raise UserError unless ``name`` is ``pocket`` or a folder with a CLIP model; loads no weights."""
    if name != "pocket":
        check_named_model("clip", name, "CLIP", ("clip",))


class Clip:
    """CLIP model (Radford et al. 2021) from a local folder, or pocket's own; embeds images and prompts.

    Embeddings have unit length, so dot products are cosine similarities in [-1, 1].

    Raises:
        UserError: ``path`` is neither ``pocket`` nor a folder.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        pocket = path == "pocket"
        folder = pocket_clip() if pocket else Path(path).expanduser()
        if not pocket and not folder.is_dir():
            raise UserError(
                f"{path} is not a folder",
                key="evaluation.clip",
                remedy="name a local folder with a CLIP model (config.json, weights)",
            )
        tokenizer_folder = pocket_pipeline() / "tokenizer" if pocket else folder
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = device
        self._mean, self._std = pixel_statistics(folder)

    @torch.no_grad()
    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Embeddings float32 [N, D] of uint8 [H, W, 3] images, resized and center-cropped to the CLIP's input size."""
        side = self.model.config.vision_config.image_size
        embeddings = []
        for first in track("Embedding images with CLIP", range(0, len(images), 64), -(-len(images) // 64)):
            batch = np.stack([_center_crop(p, side) for p in images[first : first + 64]])
            pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float() / 255
            mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self._mean, self._std))
            pooled = self.model.vision_model(pixel_values=(pixels - mean) / std).pooler_output
            embeddings.append(F.normalize(self.model.visual_projection(pooled), dim=-1))
        return torch.cat(embeddings)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings float32 [N, D] of prompts, truncated to the CLIP's maximum length."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        pooled = self.model.text_model(**tokens.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


def _center_crop(pixels: np.ndarray, side: int) -> np.ndarray:
    """``pixels`` (uint8 [H, W, 3]), resized so that the shorter side is ``side`` and center-cropped to a square."""
    image = Image.fromarray(pixels)
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def clip_image(clip: Clip, images: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """CLIP-I: mean cosine similarity of all image-reference pairs, in [-1, 1] (Ruiz et al. 2023, section 4.2)."""
    return float((clip.images(images) @ clip.images(references).T).mean())


def clip_text(clip: Clip, images: Sequence[np.ndarray], prompts: Sequence[str]) -> float:
    """CLIP-T: mean cosine similarity of each image and its prompt, in [-1, 1] (Ruiz et al. 2023, section 4.2)."""
    return float((clip.images(images) * clip.prompts(prompts)).sum(1).mean())
