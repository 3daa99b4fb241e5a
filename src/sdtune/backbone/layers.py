"""Layers of a backbone that LoRA can target, by component and name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sdtune.backbone.backbone import Backbone

BLOCKS = ("down_", "mid_", "up_")
"""Name prefixes of the UNet modules in its down, mid and up blocks."""


def named_modules(backbone: Backbone) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield component, name within the component and module for all modules of the UNet and the text encoders."""
    for component in ("unet", *backbone.encoders):
        for name, module in getattr(backbone, component).named_modules():
            yield component, name, module


def layers(backbone: Backbone) -> Iterator[tuple[str, str, nn.Linear | nn.Conv2d]]:
    """Yield (component, name in the component, layer) for each linear and convolution layer."""
    for component, name, module in named_modules(backbone):
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield component, name, module
