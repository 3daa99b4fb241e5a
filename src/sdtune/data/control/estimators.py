"""Depth and segmentation models of transformers."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sdtune.errors import UserError


def load_estimator(key: str, folder: Path, task: str, kind: Any, device: torch.device) -> tuple[Any, Any]:
    """The image processor and the model of ``kind`` in ``folder``, whole and in eval mode.

    Raises:
        UserError: for a folder without one, named by ``data.control.<key>``. A model of another kind counts as none:
            transformers would fill in what it lacks at random.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model, loaded = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = shorten(str(error), 200, placeholder=" ...")
        raise UserError(f"{folder} holds no model for {task} ({reason})", key=f"data.control.{key}") from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise UserError(
            f"{folder} holds no model for {task} ({len(missing)} of its weights are missing, first {missing[0]})",
            key=f"data.control.{key}",
        )
    return processor, model.eval().to(device)


class Estimator:
    """Depth or segmentation."""

    def __init__(self, folder: Path, task: str, device: torch.device) -> None:
        from transformers import AutoModelForDepthEstimation, AutoModelForSemanticSegmentation

        kind = AutoModelForDepthEstimation if task == "depth" else AutoModelForSemanticSegmentation
        self.task, self.device = task, device
        self.processor, self.model = load_estimator("model", folder, task, kind, device)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray]:
        """The map, uint8 [H, W, 3], of uint8 [H, W, 3]."""
        inputs = self.processor(images=Image.fromarray(pixels), return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        values = outputs.predicted_depth[:, None] if self.task == "depth" else outputs.logits
        values = F.interpolate(values.float(), size=pixels.shape[:2], mode="bilinear")[0]
        if self.task == "segmentation":
            return (colours(values.argmax(0).cpu().numpy()),)
        low, high = values.min(), values.max()
        grey = ((values - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
        return (grey.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy(),)


def colours(classes: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: three bits of a class's number at a time go to the next lower bit of red, green and blue."""
    rgb = np.zeros((*classes.shape, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            rgb[..., channel] |= ((classes >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return rgb
