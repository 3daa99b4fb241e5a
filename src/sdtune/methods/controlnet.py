"""ControlNet: a trainable copy of the denoiser's encoder, conditioned on a control map (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from sdtune import streams
from sdtune.backbone.loading import controlnets_of
from sdtune.backbone.quantization import check_quantization
from sdtune.conditioning import Conditioning
from sdtune.data.control.base import Computed
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.dataset import Batch
from sdtune.errors import UserError
from sdtune.files import replacing, write_json
from sdtune.formats.pipeline import save_component
from sdtune.methods.base import Adapter
from sdtune.randomness import generator
from sdtune.training.arguments import Common


class ControlNet(Adapter):
    """ControlNet (Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models", section 3).

    Args:
        denoiser: which weights of the denoiser are trained too: none (``frozen``), those of its decoder (``decoder``,
            the authors' ``sd_locked=False``; for control maps and styles that the denoiser does not know, with a lower
            learning rate), or all (``all``).
        denoiser_lr: learning rate of the denoiser's trained weights; the optimizer's if None.
        layers: number of copied blocks of a transformer; if None, half of its blocks, at most 12. The encoder of a UNet
            is copied whole.
        weights: path of a ControlNet with the initial weights, from any program: a folder in the diffusers layout or a
            single file; a copy of the denoiser's encoder if None.
    """

    artifact_kind = "controlnet"
    denoiser_is_read_only = False

    def __init__(
        self,
        *,
        denoiser: Literal["frozen", "decoder", "all"] = "frozen",
        denoiser_lr: Annotated[float, Gt(0)] | None = None,
        layers: Annotated[int, Ge(1)] | None = None,
        weights: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if denoiser == "frozen" and denoiser_lr is not None:
            raise UserError(
                "the denoiser is frozen, so it has no learning rate",
                key="method.denoiser_lr",
                remedy="set method.denoiser=decoder or method.denoiser=all, or remove method.denoiser_lr",
            )
        self.opened, self.denoiser_lr, self.layers, self.weights = denoiser, denoiser_lr, layers, weights
        self.controlnet: Any
        self._maps: dict[str, str | None] = {}
        """How the control maps are computed, for the artifact's sdtune.json; set by :meth:`check_data`."""

    def check_data(self, data: ImageDataModule) -> None:
        if data.control is None:
            raise UserError(
                "method=controlnet needs a control map for each image",
                key="data.control",
                remedy="set data/control=canny, scribble, paired, estimated or pocket",
            )
        if self.opened != "frozen":
            check_quantization(self.source.quantize, ("denoiser",))
        kind, config = controlnets_of(self.source.facts.family), self.source.config(self.source.denoiser_folder)
        if self.opened == "decoder" and not kind.decoder:
            raise UserError(
                f"{self.source.facts.family.title} has no decoder", key="method.denoiser", remedy="set frozen or all"
            )
        kind.check_layers(self.layers, config)
        if self.weights is not None:
            kind.find(self.weights, "method.weights", config, self.source.facts)
        self._maps = {"preprocess": data.control.name if isinstance(data.control, Computed) else None}

    def inject(self) -> None:
        kind = self.backbone.controlnets
        if self.weights is not None:
            self.controlnet = kind.load(Path(self.weights).expanduser(), "method.weights", self.backbone)
        else:
            self.controlnet = kind.copy_of(self.backbone, self.layers)
            for name, layer in kind.fresh_layers(self.controlnet):
                self._draw_weights(f"{streams.CONTROLNET_EMBEDDING}.{name}", layer)
        self.condition_encoder = self._encode_maps if kind.encodes_maps else None
        self.controlnet.train()
        for name, parameter in self.controlnet.named_parameters():
            parameter.requires_grad_(not name.startswith(kind.frozen_prefixes(self.controlnet)))
        frozen = self.backbone.frozen_prefixes("denoiser")
        for name, parameter in self.backbone.denoiser.named_parameters():
            is_opened = self.opened == "all" or (self.opened == "decoder" and name.startswith(kind.decoder))
            parameter.requires_grad_(is_opened and not name.startswith(frozen))

    def _draw_weights(self, name: str, layer: nn.Conv2d) -> None:
        """Draw weight and bias from torch's default: uniform in +-1 / sqrt(fan in)."""
        bound = layer.weight[0].numel() ** -0.5
        for part in ("weight", "bias"):
            parameter = getattr(layer, part)
            drawn = generator(self.seed, f"{streams.INITIAL_VALUES}/{name}.{part}").uniform(
                -bound, bound, tuple(parameter.shape)
            )
            parameter.data.copy_(torch.from_numpy(drawn.astype("float32")))

    def component_rates(self) -> Mapping[str, float | None]:
        return {"denoiser": self.denoiser_lr}

    def denoise(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """Denoiser output [B, C, h, w] with the ControlNet's residuals, or without them if there is no control map.

        Args:
            conditions: ``control``, if present: control maps, encoded by :meth:`ControlNetKind.encode`.
        """
        added = None
        if "control" in conditions:
            arguments = self.backbone.conditioning_arguments(conditioning, noisy)
            kind, encoded = self.backbone.controlnets, conditions["control"]
            added = kind.residuals(self.backbone, self.controlnet, noisy, timesteps, arguments, encoded)
        return self._predict(self.backbone.denoiser_inputs(noisy, timesteps, conditioning, added))

    def _encode_maps(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.backbone.controlnets.encode(self.backbone, maps) for name, maps in conditions.items()}

    def synthetic_batch(self, batch: Batch, pixels: Tensor) -> Batch:
        if self.condition_encoder is not None and "moments" in batch:
            return {**batch, "encoded_conditions": {"control": batch["moments"].chunk(2, dim=1)[0]}}
        return {**batch, "conditions": {"control": pixels}}

    def artifact_bytes(self) -> int:
        """Size in bytes of the ControlNet in float32, plus the full denoiser if any of it is trained."""
        models = [self.controlnet, *([] if self.opened == "frozen" else [self.backbone.denoiser])]
        return sum(4 * p.numel() for model in models for p in model.parameters())

    def write_artifact(self, folder: Path, name: str) -> None:
        """Write the diffusers folder ``<folder>/<name>``; a trained denoiser is saved in its subfolder."""
        subfolder = self.source.denoiser_folder
        with replacing(folder / name) as target:
            save_component(self.controlnet, target)
            if self.opened != "frozen":
                # Read the frozen weights again: in memory they may be in half precision.
                full_denoiser = self.source.load(self.seed).denoiser
                full_denoiser.load_state_dict(
                    {n: p for n, p in self.backbone.denoiser.named_parameters() if p.requires_grad}, strict=False
                )
                save_component(full_denoiser, target / subfolder)
            write_json(target / "sdtune.json", {"backbone": self.source.hash(), subfolder: self.opened, **self._maps})
