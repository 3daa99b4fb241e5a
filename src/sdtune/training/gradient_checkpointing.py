"""Gradient checkpointing: recompute activations in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module, **more: Any) -> None:
    """Enable gradient checkpointing in all diffusers and transformers submodules of ``model`` that support it.

    Uses the non-reentrant variant: the reentrant one gives no gradient to LoRA pairs of a text encoder, because the
    inputs of its layers do not require gradients.

    The state of the random number generators is saved only if a layer drops out values: reading that of a GPU waits for
    the device, once for each checkpointed block.

    Args:
        more: additional arguments of ``torch.utils.checkpoint.checkpoint``.
    """
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": _drops_out(model), **more}

    def run(module: nn.Module, *args: Any) -> Any:
        return checkpoint(module.__call__, *args, **settings)

    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing(run)
        elif hasattr(module, "gradient_checkpointing_enable"):
            with warnings.catch_warnings():
                # Its replacement is missing in the oldest supported versions of transformers.
                warnings.simplefilter("ignore", FutureWarning)
                module.gradient_checkpointing_enable(settings)


def _drops_out(model: nn.Module) -> bool:
    """Whether a layer of ``model`` has dropout; attention of transformers has it as a number in its config."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or getattr(getattr(module, "config", None), "attention_dropout", 0) > 0
        for module in model.modules()
    )
