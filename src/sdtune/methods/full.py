"""Full fine-tuning: all weights of the selected components are trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Unpack

from annotated_types import Ge, Gt
from torch import Tensor, nn

from sdtune import streams
from sdtune.backbone.families import Component
from sdtune.backbone.new_token_vectors import without_new_tokens
from sdtune.backbone.pretrained import Pretrained
from sdtune.backbone.source import unused_folders
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.dataset import Batch
from sdtune.errors import UserError
from sdtune.files import replacing, write_json
from sdtune.formats.keys import canonical_key
from sdtune.formats.pipeline import copy_pipeline, save_component, save_text_encoder, write_scheduler
from sdtune.methods.base import Adapter
from sdtune.training.arguments import Common
from sdtune.training.perceptual_loss import PerceptualLoss

log = logging.getLogger("sdtune")


class Full(Adapter):
    """Full fine-tuning of the denoiser, the text encoder and the VAE, in any combination.

    The denoiser and the text encoder are trained with the diffusion loss (Rombach et al. 2022, section 3.3, as in
    pretraining), with no gradient to the VAE. The VAE is trained with a separate reconstruction loss (Kingma & Welling
    2014; Rombach et al. 2022, appendix G, without the discriminator): the diffusion loss has no gradient for the
    decoder, and would train the encoder to make latents that are easy to denoise but contain no information.

    Args:
        parts: components to train.
        text_encoder_lr: learning rate of the text encoder; the optimizer's if None.
        vae_lr: learning rate of the VAE; the optimizer's if None.
        kl_weight: weight of the VAE's KL term (mean over latent elements), relative to the L1 term (mean over pixels).
        perception: folder of a CLIP model whose image encoder computes a perceptual term of the VAE loss; no such term
            if None.
        perception_weight: weight of the perceptual term.
    """

    artifact_kind = "model"
    denoiser_is_read_only = False

    def __init__(
        self,
        *,
        parts: Sequence[Component] = ("denoiser",),
        text_encoder_lr: Annotated[float, Gt(0)] | None = None,
        vae_lr: Annotated[float, Gt(0)] | None = None,
        kl_weight: Annotated[float, Ge(0)] = 1e-4,
        perception: str | None = None,
        perception_weight: Annotated[float, Ge(0)] = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if not parts:
            raise UserError(
                "the list is empty", key="method.parts", remedy="set at least one of denoiser, text_encoder, vae"
            )
        if perception is not None and "vae" not in parts:
            raise UserError(
                "only the VAE loss has a perceptual term, and the VAE is not trained",
                key="method.perception",
                remedy="add vae to method.parts",
            )
        if perception is not None and not Path(perception).expanduser().is_dir():
            raise UserError(
                f"{perception} is not a folder",
                key="method.perception",
                remedy="set it to a local folder with a CLIP model",
            )
        for part, rate in (("text_encoder", text_encoder_lr), ("vae", vae_lr)):
            if rate is not None and part not in parts:
                raise UserError(
                    f"got {rate}, but {part} is not trained",
                    key=f"method.{part}_lr",
                    remedy=f"add {part} to method.parts, or remove method.{part}_lr",
                )
        self.parts = tuple(parts)
        self.rates = {"text_encoder": text_encoder_lr, "vae": vae_lr}
        self.kl_weight, self.perception_path, self.perception_weight = kl_weight, perception, perception_weight
        self._perception: list[PerceptualLoss] = []
        """The perceptual loss, loaded on first use; in a list, so that it is not a submodule of the model."""

    def check_data(self, data: ImageDataModule) -> None:
        if data.held_out and self.parts == ("vae",):
            raise UserError(
                "the validation loss is the diffusion loss, which does not measure method.parts=[vae]",
                key="data.hold_out",
                remedy="remove data.hold_out",
            )

    def inject(self) -> None:
        models: dict[str, nn.Module] = {}
        for part in self.parts:
            encoders = self.backbone.trainable_encoders
            models |= encoders if part == "text_encoder" else {part: getattr(self.backbone, part)}
        for component, model in models.items():
            # These parameters would get no gradient, and DDP would fail; or no file has a place for them.
            frozen = self.backbone.frozen_prefixes(component)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen))
            if frozen and component == "denoiser":
                log.info("%s: not trained, because it has no effect: %s", component, ", ".join(frozen))

    def component_rates(self) -> Mapping[str, float | None]:
        return self.rates

    def extra_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Terms of the VAE loss: L1, ``kl_weight`` KL and, with ``perception``, the weighted perceptual distance."""
        if "vae" not in self.parts:
            return {}
        moments, pixels = batch["moments"], batch["pixels"]
        noise = self.noise(
            (moments.shape[1] // 2, *moments.shape[2:]),
            f"{streams.TRAIN}/{streams.VAE}",
            batch["step"],
            batch["positions"],
        )
        reconstruction = self.backbone.reconstruct(moments, noise)
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        # KL(N(mean, variance) || N(0, 1)), Kingma & Welling 2014, appendix B.
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        terms = {"loss/vae_l1": (reconstruction - pixels).abs().mean(), "loss/vae_kl": self.kl_weight * kl}
        if self.perception_path is not None:
            if not self._perception:
                self._perception.append(PerceptualLoss(self.perception_path, self.device))
            terms["loss/vae_perception"] = self.perception_weight * self._perception[0](reconstruction, pixels)
        return terms

    def artifact_bytes(self) -> int:
        """Size in bytes of the full pipeline in float32, including its frozen components."""
        return sum(4 * p.numel() for p in self.backbone.parameters())

    def write_artifact(self, folder: Path, name: str) -> None:
        """Write a pipeline folder in the diffusers layout, ``<folder>/<name>``; frozen components are copied."""
        pipeline = folder / name
        encoders = self.backbone.trainable_encoders if "text_encoder" in self.parts else {}
        models = {
            self.source.folder_of(part): getattr(self.backbone, part) for part in self.parts if part != "text_encoder"
        }
        trained = [*models, *encoders]
        with replacing(pipeline) as target:
            absent = unused_folders(self.source)
            copy_pipeline(self.source.folder(), target, trained, self.source.weights(trained), absent)
            for subfolder, model in models.items():
                save_component(model, target / subfolder)
            self._save_encoders(encoders, target)
            if self.backbone.scheduler_config != self.source.config("scheduler"):
                write_scheduler(target, self.backbone.scheduler_config)
            write_json(target / "sdtune.json", {"backbone": self.source.hash()})

    def _save_encoders(self, encoders: Mapping[str, nn.Module], pipeline: Path) -> None:
        with without_new_tokens(self.backbone):
            for name, encoder in encoders.items():
                frozen = [canonical_key(name, n) for n, p in encoder.named_parameters() if not p.requires_grad]
                # Read the frozen layers again: in memory they may be in half precision.
                original = self.source.tensors(name) if frozen else {}
                save_text_encoder(encoder, pipeline / name, {key: original[key] for key in frozen})

    def artifact_metadata(self, artifact: Path) -> dict[str, str]:
        """Metadata with the hash of the trained pipeline: new tokens trained with it must be loaded onto it."""
        return {"sdtune_backbone_hash": Pretrained(str(artifact)).hash()}
