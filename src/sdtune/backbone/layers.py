"""The layers of a backbone that LoRA can target, by component and name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sdtune.backbone.backbone import Backbone

BLOCKS = ("down_", "mid_", "up_")
"""Starts of the names of a UNet's modules that lie in its residual and transformer blocks."""


def named_modules(backbone: Backbone) -> Iterator[tuple[str, str, nn.Module]]:
    """Component, name in it, and module: every one of the UNet and of the text encoders."""
    for component in ("unet", *backbone.encoders):
        for name, module in getattr(backbone, component).named_modules():
            yield component, name, module


def layers(backbone: Backbone) -> Iterator[tuple[str, str, nn.Linear | nn.Conv2d]]:
    """Linear and convolution layers of the UNet and the text encoders: component, name in it, and layer."""
    for component, name, module in named_modules(backbone):
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield component, name, module
