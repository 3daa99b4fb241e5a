"""Layers of a backbone that LoRA can target, by component and name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sdtune.backbone.backbone import Backbone
from sdtune.formats.lora import canonical


def named_modules(backbone: Backbone) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield component, name within the component and module for all modules of the denoiser and the text encoders."""
    for component, model in {"denoiser": backbone.denoiser, **backbone.encoders}.items():
        for name, module in model.named_modules():
            yield component, name, module


def layers(backbone: Backbone) -> Iterator[tuple[str, str, nn.Linear | nn.Conv2d]]:
    """Yield (component, name in the component, layer) for each linear and convolution layer."""
    for component, name, module in named_modules(backbone):
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield component, name, module


def module_path(backbone: Backbone, component: str, name: str) -> str:
    """Path of a module in LoRA files: folder of its component in a pipeline, then its name; see :func:`canonical`."""
    folder = backbone.facts.family.denoiser if component == "denoiser" else component
    return canonical(f"{folder}.{name}")
