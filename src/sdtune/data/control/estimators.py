"""Depth and segmentation estimators from transformers."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sdtune.errors import UserError

_REMEDY = "set it to a folder with a transformers model for {}, saved as safetensors"


def load_estimator(key: str, folder: Path, task: str, model_class: Any, device: torch.device) -> tuple[Any, Any]:
    """Load the image processor and the model of ``model_class`` from ``folder``, in eval mode.

    Raises:
        UserError: ``folder`` (set by ``data.control.<key>``) has no complete model of this class. transformers would
            initialize missing weights at random.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model, loading_info = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = shorten(str(error), 60, placeholder=" ...")
        raise UserError(
            f"{folder} contains no model for {task} ({reason})",
            key=f"data.control.{key}",
            remedy=_REMEDY.format(task),
        ) from error
    if loading_info["missing_keys"]:
        missing = sorted(loading_info["missing_keys"])
        raise UserError(
            f"{folder} contains no model for {task} ({len(missing)} weights are missing, the first is {missing[0]})",
            key=f"data.control.{key}",
            remedy=_REMEDY.format(task),
        )
    return processor, model.eval().to(device)


class Estimator:
    """Depth or segmentation estimator.

    Args:
        folder: folder of the transformers model.
        task: ``depth`` or ``segmentation``.
    """

    def __init__(self, folder: Path, task: str, device: torch.device) -> None:
        from transformers import AutoModelForDepthEstimation, AutoModelForSemanticSegmentation

        model_class = AutoModelForDepthEstimation if task == "depth" else AutoModelForSemanticSegmentation
        self.task, self.device = task, device
        self.processor, self.model = load_estimator("model", folder, task, model_class, device)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> tuple[np.ndarray]:
        """Maps of an image, all uint8 [H, W, 3]; a tuple, because ``PoseEstimator`` returns two."""
        inputs = self.processor(images=Image.fromarray(pixels), return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        values = outputs.predicted_depth[:, None] if self.task == "depth" else outputs.logits
        values = F.interpolate(values.float(), size=pixels.shape[:2], mode="bilinear")[0]
        if self.task == "segmentation":
            return (class_colors(values.argmax(0).cpu().numpy()),)
        low, high = values.min(), values.max()
        gray = ((values - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
        return (gray.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy(),)


def class_colors(classes: np.ndarray) -> np.ndarray:
    """Colors of class ids [H, W] in the palette of PASCAL VOC: uint8 [H, W, 3].

    Bits 0, 1 and 2 of an id are bit 7 of red, green and blue; bits 3, 4 and 5 are bit 6; and so on.
    """
    rgb = np.zeros((*classes.shape, 3), dtype=np.uint8)
    for group in range(8):
        for channel in range(3):
            rgb[..., channel] |= ((classes >> (3 * group + channel) & 1) << (7 - group)).astype(np.uint8)
    return rgb
