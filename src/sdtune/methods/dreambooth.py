"""DreamBooth: the UNet learns a subject under a rare word, with prior preservation (Ruiz et al. 2023)."""

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
    """Full fine-tuning on pairs of a subject's and its class's images (Ruiz et al. 2022, section 3).

    L = L_simple(subject) + lambda L_simple(class); the pairs and lambda are the data's (``data.class_prompt``,
    ``data.prior_weight``), so that other methods train on them too.

    Args:
        parts: the UNet, by choice with the text encoder; the VAE stays as it is.
        text_encoder_lr: learning rate of the text encoder; the optimizer's if None.
    """

    reads_denoiser_only = False
    uses_class_images = True

    def __init__(
        self,
        *,
        parts: Sequence[Component] = ("unet",),
        text_encoder_lr: Annotated[float, Gt(0)] | None = None,
        **common: Unpack[Common],
    ) -> None:
        if "vae" in parts:
            raise UserError("DreamBooth leaves the VAE as it is; method=full trains it", key="method.parts")
        super().__init__(parts=parts, text_encoder_lr=text_encoder_lr, **common)

    def check_data(self, data: ImageDataModule) -> None:
        """Refuses data without class images, unless their weight is 0."""
        if data.prior_weight > 0 and not data.has_prior:
            raise UserError(
                "data.class_prompt is missing: DreamBooth keeps the class by its images",
                remedy='give data.class_prompt="a photo of a dog" or data.class_path=DIR, or'
                " data.prior_weight=0 to train without them",
            )
