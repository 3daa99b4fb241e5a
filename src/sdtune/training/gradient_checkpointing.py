"""Gradient checkpointing: activations are recomputed in backward (Chen et al. 2016)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module, **more: Any) -> None:
    """Switch it on in each part of ``model`` that knows it, diffusers' and transformers' alike.

    Non-reentrant: the other kind gives no gradient to a text encoder's low-rank pairs, whose inputs need none.

    Args:
        more: further arguments of ``torch.utils.checkpoint.checkpoint``.
    """
    settings: dict[str, Any] = {"use_reentrant": False, **more}

    def run(module: nn.Module, *args: Any) -> Any:
        return checkpoint(module.__call__, *args, **settings)

    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing(run)
        elif hasattr(module, "gradient_checkpointing_enable"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # its new name is not in all versions that we take
                module.gradient_checkpointing_enable(settings)
