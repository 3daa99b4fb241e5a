"""DreamBooth: full fine-tuning on a subject with prior preservation (Ruiz et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Unpack

from annotated_types import Gt

from sdtune.backbone.families import Component
from sdtune.data.datamodule import ImageDataModule
from sdtune.errors import UserError
from sdtune.methods.full import Full
from sdtune.training.arguments import Common


class DreamBooth(Full):
    """Full fine-tuning on pairs of a subject image and a class image (Ruiz et al. 2023, section 3).

    L = L_simple(subject) + lambda L_simple(class). The data module makes the pairs and sets lambda
    (``data.class_prompt``, ``data.prior_weight``), so that other methods can use them too.

    Args:
        parts: components to train, ``denoiser`` and ``text_encoder``; the VAE stays frozen.
        text_encoder_lr: learning rate of the text encoder; the optimizer's if None.
    """

    denoiser_is_read_only = False
    uses_class_images = True

    def __init__(
        self,
        *,
        parts: Sequence[Component] = ("denoiser",),
        text_encoder_lr: Annotated[float, Gt(0)] | None = None,
        **common: Unpack[Common],
    ) -> None:
        if "vae" in parts:
            raise UserError(
                "DreamBooth does not train the VAE", key="method.parts", remedy="remove vae, or use method=full"
            )
        super().__init__(parts=parts, text_encoder_lr=text_encoder_lr, **common)

    def check_data(self, data: ImageDataModule) -> None:
        """Raise UserError if the data has no class images, unless ``data.prior_weight`` is 0."""
        if data.prior_weight > 0 and not data.has_prior:
            raise UserError(
                "missing, but DreamBooth needs class images for prior preservation",
                key="data.class_prompt",
                remedy='set data.class_prompt="a photo of a dog" or data.class_path=DIR,'
                " or data.prior_weight=0 to train without them",
            )
