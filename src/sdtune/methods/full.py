"""Full fine-tuning: every weight of the opened components is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Unpack

from annotated_types import Ge, Gt
from torch import Tensor, nn

from sdtune import streams
from sdtune.backbone.families import Component
from sdtune.backbone.pretrained import Pretrained
from sdtune.backbone.words import plain_vocabulary
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.dataset import Batch
from sdtune.errors import UserError
from sdtune.files import replacing, write_json
from sdtune.formats.keys import canonical_key
from sdtune.formats.pipeline import copy_pipeline, save_component, save_text_encoder
from sdtune.methods.base import Adapter
from sdtune.training.arguments import Common
from sdtune.training.perceptual_loss import Perception


class Full(Adapter):
    """UNet, text encoder and VAE, in any combination.

    UNet and text encoder learn from the diffusion loss (Rombach et al. 2022, section 3.3: the same as in pretraining),
    on latents of the VAE held fixed within the step. The VAE learns from a reconstruction loss of its own
    (Kingma & Welling 2014; Rombach et al. 2022, appendix G, without the discriminator): the diffusion loss gives its
    decoder no gradient, and would have its encoder make latents that are easy to denoise because they say nothing.

    Args:
        parts: what is opened.
        text_encoder_lr: learning rate of the text encoder; the optimizer's if None.
        vae_lr: of the VAE, likewise.
        kl_weight: of the VAE's KL term, a mean over the latent's numbers, against the L1 term's mean over pixels.
        perception: the folder of a CLIP whose image encoder adds a perceptual term to the VAE's loss; none if None.
        perception_weight: of that term.
    """

    artifact_kind = "model"
    reads_denoiser_only = False

    def __init__(
        self,
        *,
        parts: Sequence[Component] = ("unet",),
        text_encoder_lr: Annotated[float, Gt(0)] | None = None,
        vae_lr: Annotated[float, Gt(0)] | None = None,
        kl_weight: Annotated[float, Ge(0)] = 1e-4,
        perception: str | None = None,
        perception_weight: Annotated[float, Ge(0)] = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if not parts:
            raise UserError("method.parts is empty", remedy="name at least one of unet, text_encoder, vae")
        if perception is not None and "vae" not in parts:
            raise UserError(
                "only the VAE has a perceptual term", key="method.perception", remedy="add vae to method.parts"
            )
        if perception is not None and not Path(perception).expanduser().is_dir():
            raise UserError(
                f"{perception} is not a folder", key="method.perception", remedy="name a local folder with a CLIP model"
            )
        self.parts = tuple(parts)
        self.rates = {"text_encoder": text_encoder_lr, "vae": vae_lr}
        self.kl_weight, self.perception_path, self.perception_weight = kl_weight, perception, perception_weight
        self._perception: list[Perception] = []
        """Held in a list: as a submodule it would be taken for a part of the model."""

    def check_data(self, data: ImageDataModule) -> None:
        if data.held_out and self.parts == ("vae",):
            raise UserError(
                "the validation loss is the diffusion loss, which says nothing of method.parts=[vae]",
                key="data.hold_out",
                remedy="leave it out",
            )

    def inject(self) -> None:
        for part in self.parts:
            if part != "text_encoder":
                getattr(self.backbone, part).requires_grad_(True)
                continue
            for component, encoder in self.backbone.encoders.items():
                behind = self.backbone.unused(component)
                for name, parameter in encoder.named_parameters():
                    # Layers behind the states that are used would get no gradient, on which DDP fails.
                    parameter.requires_grad_(not name.startswith(behind))

    def component_rates(self) -> Mapping[str, float | None]:
        return self.rates

    def extra_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The VAE's: L1 + ``kl_weight`` KL, and a perceptual term where an encoder is given."""
        if "vae" not in self.parts:
            return {}
        moments, pixels = batch["moments"], batch["pixels"]
        noise = self.noise(
            (moments.shape[1] // 2, *moments.shape[2:]),
            f"{streams.TRAIN}/{streams.VAE}",
            batch["step"],
            batch["positions"],
        )
        rebuilt = self.backbone.reconstruct(moments, noise)
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        # KL(N(mean, variance) || N(0, 1)), Kingma & Welling 2014, appendix B.
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        terms = {"loss/vae_l1": (rebuilt - pixels).abs().mean(), "loss/vae_kl": self.kl_weight * kl}
        if self.perception_path is not None:
            if not self._perception:
                self._perception.append(Perception(self.perception_path, self.device))
            terms["loss/vae_perception"] = self.perception_weight * self._perception[0](rebuilt, pixels)
        return terms

    def artifact_bytes(self) -> int:
        """The whole pipeline's, with its frozen parts as float32 files."""
        return sum(4 * p.numel() for p in self.backbone.parameters())

    def write_artifact(self, folder: Path, name: str) -> None:
        """A pipeline folder in the diffusers layout, ``<folder>/<name>``; what was frozen is copied from its source."""
        target = folder / name
        encoders = self.backbone.encoders if "text_encoder" in self.parts else {}
        models = {part: getattr(self.backbone, part) for part in self.parts if part != "text_encoder"}
        trained = [*models, *encoders]
        with replacing(target) as place:
            copy_pipeline(self.source.folder(), place, trained, self.source.weights(trained))
            for part, model in models.items():
                save_component(model, place / part)
            self._save_encoders(encoders, place)
            if self.backbone.scheduler_config != self.source.config("scheduler"):
                write_json(place / "scheduler" / "scheduler_config.json", self.backbone.scheduler_config)
            write_json(place / "sdtune.json", {"backbone": self.source.hash()})

    def _save_encoders(self, encoders: Mapping[str, nn.Module], pipeline: Path) -> None:
        with plain_vocabulary(self.backbone):
            for name, encoder in encoders.items():
                frozen = [canonical_key(name, n) for n, p in encoder.named_parameters() if not p.requires_grad]
                # Frozen layers may be in half precision here, so they are read again.
                fresh = self.source.tensors(name) if frozen else {}
                save_text_encoder(encoder, pipeline / name, {key: fresh[key] for key in frozen})

    def about(self, artifact: Path) -> dict[str, str]:
        """Words learned beside what was opened belong to the trained pipeline."""
        return {"sdtune_backbone_hash": Pretrained(str(artifact)).hash()}
