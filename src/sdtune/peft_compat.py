"""The private names of peft that sdtune uses, and no others."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import nn


def register_layers(config: LoraConfig, layers: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Have peft put ``layers`` of one's own, by the type that they wrap, in place of its own."""
    config._register_custom_module(dict(layers))
