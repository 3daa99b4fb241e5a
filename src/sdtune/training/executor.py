"""Model executors: compute the denoiser's predictions and gradients for a method."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class ModelExecutor(Protocol):
    """Computes the forward and backward passes of the denoiser for one run."""

    def predict(self, denoiser: Any, inputs: dict[str, Any]) -> Tensor:
        """Output of ``denoiser``, [B, C, h, w].

        Args:
            inputs: arguments of ``denoiser``, from :meth:`sdtune.backbone.backbone.Backbone.denoiser_inputs`.
        """

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of ``loss`` to the trainable parameters; the arguments are those of ``Tensor.backward``."""


class LocalExecutor:
    """Calls the denoiser and ``Tensor.backward`` directly, without sharing."""

    def predict(self, denoiser: Any, inputs: dict[str, Any]) -> Tensor:
        output: Tensor = denoiser(**inputs).sample
        return output

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
