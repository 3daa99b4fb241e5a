"""All private names of peft that sdtune uses."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import nn


def register_layers(config: LoraConfig, layers: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Register custom LoRA layer classes with peft: wrapped module type -> layer class."""
    config._register_custom_module(dict(layers))
