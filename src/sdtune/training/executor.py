"""Model executors: where an adapter's predictions and gradients are computed."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import Residuals


class ModelExecutor(Protocol):
    """Computes the forward and backward passes of one run's denoiser."""

    def predict(
        self,
        backbone: Backbone,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        added: Residuals | None = None,
        frame: Tensor | None = None,
    ) -> Tensor:
        """The denoiser's output; arguments and shapes as of :meth:`sdtune.backbone.backbone.Backbone.predict`."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of ``loss`` to the trained parameters; arguments as of ``Tensor.backward``."""


class LocalExecutor:
    """Computes on the run's own backbone, at once."""

    def predict(
        self,
        backbone: Backbone,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        added: Residuals | None = None,
        frame: Tensor | None = None,
    ) -> Tensor:
        return backbone.predict(noisy, timesteps, text, added, frame)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
