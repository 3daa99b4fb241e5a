"""Batch sizes for encoding images with the VAE and for generating class images, from pixel budgets."""

from __future__ import annotations


def batch_size_for_pixels(pixels: int, width: int, height: int) -> int:
    """Batch size for a pixel budget, clamped to 1..64."""
    return max(1, min(64, pixels // (width * height)))


def vae_batch_size(width: int, height: int, device_type: str) -> int:
    """Batch size of the VAE's encoder for images of this size, on a device of type ``device_type``.

    On a CPU a batch has about the pixels of one image of 256x256: with four times as many, encoding one image took 25%
    longer. On other devices it has about the pixels of four images of 512x512, whose activations need about 8 GB.
    """
    return batch_size_for_pixels(256 * 256 if device_type == "cpu" else 4 * 512 * 512, width, height)


def class_image_batch_size(side: int) -> int:
    """Batch size for generating class images of ``side`` x ``side`` pixels: 4 at 512 x 512."""
    return batch_size_for_pixels(4 * 512 * 512, side, side)


def text_batch_size(*, has_t5: bool) -> int:
    """Number of prompts that are encoded at once for the cache.

    T5 fills a GPU with a thousand tokens, and its 9 GB of weights should leave room on one of 12 GB.
    """
    return 4 if has_t5 else 64
