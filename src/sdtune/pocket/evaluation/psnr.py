"""Peak signal-to-noise ratio (PSNR) of reconstructed images."""

from __future__ import annotations

import numpy as np


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR in dB of each image, with a peak of 255: float64 [N] from two uint8 [N, H, W, C].

    10 log10(255^2 / MSE); infinite if an image equals its ground truth.
    """
    mse = np.square(images.astype(np.float64) - truth).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        decibels: np.ndarray = 10 * np.log10(255.0**2 / mse)
    return decibels
