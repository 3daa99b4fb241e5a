"""Masks of what words describe, from CLIPSeg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPSegForImageSegmentation

from sdtune.captioning.models import load_transformers_model
from sdtune.hardware.precision import autocast, generation_dtype


class Masker:
    """CLIPSeg model (Lueddecke & Ecker 2022, Image Segmentation Using Text and Image Prompts).

    Args:
        folder: folder of the model.
        words: a mask is the union of what these texts describe: the maximum of their probabilities.
        threshold: minimum probability of white pixels; the others are black. None: the probability is the gray value.
        precision: Lightning's precision; on a GPU, the weights have its half precision.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(
        self, folder: Path, words: Sequence[str], threshold: float | None, device: torch.device, precision: str
    ) -> None:
        on_cpu = device.type == "cpu"
        self._words, self._threshold, self._device = list(words), threshold, device
        self._dtype = (None if on_cpu else generation_dtype(device, precision)) or torch.float32
        self._precision = precision if on_cpu else "32-true"
        self._processor, self._model = load_transformers_model(CLIPSegForImageSegmentation, folder, device, self._dtype)

    def __call__(self, images: Sequence[Image.Image]) -> list[npt.NDArray[np.uint8]]:
        """One mask per image, uint8 [height, width]; the images are in mode RGB."""
        return [
            mask_pixels(probabilities, image.size, self._threshold)
            for image, probabilities in zip(images, self._probabilities(list(images)), strict=True)
        ]

    @torch.no_grad()
    def _probabilities(self, images: list[Image.Image]) -> torch.Tensor:
        """Probabilities [N, side, side] at the resolution of the model."""
        count = len(self._words)
        tokens = self._processor.tokenizer(
            self._words * len(images), padding=True, truncation=True, return_tensors="pt"
        ).to(self._device)
        pixels = self._processor.image_processor(images, return_tensors="pt")["pixel_values"]
        pixels = pixels.repeat_interleave(count, 0).to(self._device, self._dtype)
        with autocast(self._device, self._precision):
            logits = self._model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
            ).logits
        probabilities: torch.Tensor = logits.float().sigmoid()
        return probabilities.reshape(len(images), count, *probabilities.shape[1:]).amax(1)


def mask_pixels(probabilities: torch.Tensor, size: tuple[int, int], threshold: float | None) -> npt.NDArray[np.uint8]:
    """Mask of ``size``, which is (width, height), from ``probabilities`` [side, side], resized bilinearly.

    Returns:
        uint8 [height, width]: 255 or 0, or gray if ``threshold`` is None.
    """
    resized = F.interpolate(probabilities[None, None], size=(size[1], size[0]), mode="bilinear")[0, 0]
    values = resized if threshold is None else (resized >= threshold).float()
    return (values * 255).round().to(torch.uint8).cpu().numpy()
