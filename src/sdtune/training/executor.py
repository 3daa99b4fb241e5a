"""Model executors: where an adapter's predictions and gradients are computed."""

from __future__ import annotations

from typing import Any, Protocol

from diffusers import UNet2DConditionModel
from torch import Tensor


class ModelExecutor(Protocol):
    """Computes the forward and backward passes of one run's denoiser."""

    def predict(self, unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Tensor:
        """The output of ``unet``, [B, C, h, w].

        Args:
            inputs: its arguments, from :meth:`sdtune.backbone.backbone.Backbone.unet_inputs`.
        """

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of ``loss`` to the trained parameters; arguments as of ``Tensor.backward``."""


class LocalExecutor:
    """Computes at once, on the run's own UNet."""

    def predict(self, unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Tensor:
        output: Tensor = unet(**inputs).sample
        return output

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
