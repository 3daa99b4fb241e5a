"""Take the frozen weights of a finished training, to generate images with the base model."""

from __future__ import annotations

from torch import nn

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.layers import named_modules
from sdtune.backbone.new_token_vectors import remove_tokens


def release_backbone(adapter: nn.Module) -> Backbone | None:
    """Take the backbone from ``adapter``, which cannot be used afterwards; remove its LoRA pairs and new tokens.

    Returns:
        The backbone; None if a weight of it was trained, or if other runs share it.
    """
    backbone = adapter.backbone
    assert isinstance(backbone, Backbone)
    del adapter.backbone
    if backbone.pair_executor is not None:
        return None
    for component, name, module in list(named_modules(backbone)):
        if hasattr(module, "lora_A"):
            parent, _, child = name.rpartition(".")
            setattr(getattr(backbone, component).get_submodule(parent), child, module.base_layer)
    remove_tokens(backbone)
    if any(parameter.requires_grad for parameter in backbone.parameters()):
        return None
    return backbone.eval()
