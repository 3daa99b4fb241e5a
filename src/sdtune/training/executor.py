"""Model executors: compute the UNet's predictions and gradients for a method."""

from __future__ import annotations

from typing import Any, Protocol

from diffusers import UNet2DConditionModel
from torch import Tensor


class ModelExecutor(Protocol):
    """Computes the forward and backward passes of the UNet for one run."""

    def predict(self, unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Tensor:
        """Output of ``unet``, [B, C, h, w].

        Args:
            inputs: arguments of ``unet``, from :meth:`sdtune.backbone.backbone.Backbone.unet_inputs`.
        """

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of ``loss`` to the trainable parameters; the arguments are those of ``Tensor.backward``."""


class LocalExecutor:
    """Calls the UNet and ``Tensor.backward`` directly, without sharing."""

    def predict(self, unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Tensor:
        output: Tensor = unet(**inputs).sample
        return output

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
