"""Pixel normalization of a CLIP model, from its folder."""

from __future__ import annotations

from pathlib import Path

from sdtune.files import read_json

_OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def pixel_statistics(folder: Path) -> Statistics:
    """Mean and standard deviation per channel for pixels in [0, 1]; OpenAI's values if ``folder`` defines none."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return _OPENAI
    content = read_json(file)
    mean, std = (
        tuple(content.get(key, default)) for key, default in zip(("image_mean", "image_std"), _OPENAI, strict=True)
    )
    return mean, std
