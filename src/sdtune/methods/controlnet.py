"""ControlNet: a trainable copy of the UNet's encoder reads a control map (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Unpack

import torch
from annotated_types import Gt
from diffusers import ControlNetModel
from torch import Tensor, nn

from sdtune import streams
from sdtune.backbone.controlnet import residuals, skips
from sdtune.backbone.controlnet_files import embedding_widths, find_controlnet, load_controlnet
from sdtune.data.control.base import Computed
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.dataset import Batch
from sdtune.errors import UserError
from sdtune.files import replacing, write_json
from sdtune.formats.pipeline import save_component
from sdtune.methods.base import Adapter
from sdtune.randomness import generator
from sdtune.training.arguments import Common

_DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")


class ControlNet(Adapter):
    """Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models", section 3.

    Args:
        unet: what of the UNet is trained along: nothing, its decoder (the authors' ``sd_locked=False``: for maps and
            styles that it does not know, at a lower rate), or all of it.
        unet_lr: the opened UNet's own learning rate; the optimizer's if None.
        weights: a ControlNet to begin from, a folder in the diffusers layout or a single file, sdtune's or another's; a
            copy of the UNet's encoder if None.
    """

    artifact_kind = "controlnet"
    reads_denoiser_only = False

    def __init__(
        self,
        *,
        unet: Literal["frozen", "decoder", "open"] = "frozen",
        unet_lr: Annotated[float, Gt(0)] | None = None,
        weights: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if unet == "frozen" and unet_lr is not None:
            raise UserError(
                "the UNet is frozen", key="method.unet_lr", remedy="set method.unet=decoder or open, or leave it out"
            )
        self.unet, self.unet_lr, self.weights = unet, unet_lr, weights
        self.controlnet: ControlNetModel
        self._maps: dict[str, str | None] = {}
        """How the maps that it learns from are made, once the data is known; goes into the artifact."""

    def check_data(self, data: ImageDataModule) -> None:
        if data.control is None:
            raise UserError(
                "method=controlnet learns from a map of each image",
                key="data.control",
                remedy="choose one with data/control=canny, scribble, paired, estimated or pocket",
            )
        if self.weights is not None:
            find_controlnet(self.weights, "method.weights", self.source.config("unet"), self.source.facts.factor)
        self._maps = {"preprocess": data.control.name if isinstance(data.control, Computed) else None}

    def inject(self) -> None:
        unet = self.backbone.unet
        if self.weights is not None:
            place, widths = Path(self.weights).expanduser(), embedding_widths(self.backbone.facts.factor)
            self.controlnet = load_controlnet(place, "method.weights", unet, widths)
        else:
            self._copy()
        assert len(self.controlnet.controlnet_down_blocks) == skips(unet)
        self.controlnet.train()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(self.unet == "open" or (self.unet == "decoder" and name.startswith(_DECODER)))

    def _copy(self) -> None:
        """The UNet's encoder, and an embedding of maps that is drawn from the run's seed."""
        with torch.random.fork_rng(devices=[]):  # what this draws is drawn again, from the run's seed
            self.controlnet = ControlNetModel.from_unet(
                self.backbone.unet, conditioning_embedding_out_channels=embedding_widths(self.backbone.facts.factor)
            )
        embedding = self.controlnet.controlnet_cond_embedding
        for name, layer in (
            ("conv_in", embedding.conv_in),
            *((f"blocks.{i}", b) for i, b in enumerate(embedding.blocks)),
        ):
            self._draw(f"{streams.CONTROLNET_EMBEDDING}.{name}", layer)

    def _draw(self, name: str, layer: nn.Conv2d) -> None:
        """torch's default: uniform within 1 / sqrt(fan in)."""
        bound = layer.weight[0].numel() ** -0.5
        for part in ("weight", "bias"):
            parameter = getattr(layer, part)
            drawn = generator(self.seed, f"{streams.INITIAL_VALUES}/{name}.{part}").uniform(
                -bound, bound, tuple(parameter.shape)
            )
            parameter.data.copy_(torch.from_numpy(drawn.astype("float32")))

    def component_rates(self) -> Mapping[str, float | None]:
        return {"unet": self.unet_lr}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: Tensor, batch: Batch) -> Tensor:
        """Under ``batch["control"]``, float32 [B, 3, H, W] in [0, 1]; the UNet alone where there is none."""
        frame, added = batch.get("frame"), None
        if "control" in batch:
            conditions = self.backbone.conditions(text, noisy, frame)
            added = residuals(self.controlnet, noisy, timesteps, conditions, batch["control"])
        inputs = self.backbone.unet_inputs(noisy, timesteps, text, added, frame)
        return self.executor.predict(self.backbone.unet, inputs)

    @classmethod
    def synthetic_batch(cls, batch: Batch, pixels: Tensor) -> Batch:
        return {**batch, "control": pixels}

    def artifact_bytes(self) -> int:
        """The net's, and the whole UNet's where any of it is open."""
        parts = [self.controlnet, *([] if self.unet == "frozen" else [self.backbone.unet])]
        return sum(4 * p.numel() for part in parts for p in part.parameters())

    def write_artifact(self, folder: Path, name: str) -> None:
        """diffusers' ControlNet, ``<folder>/<name>``; a UNet that was trained along goes with it, as ``unet/``."""
        with replacing(folder / name) as place:
            save_component(self.controlnet, place)
            if self.unet != "frozen":
                # Frozen parts may be in half precision here, so they are read again.
                whole = self.source.load(self.seed).unet
                whole.load_state_dict(
                    {n: p for n, p in self.backbone.unet.named_parameters() if p.requires_grad}, strict=False
                )
                save_component(whole, place / "unet")
            write_json(place / "sdtune.json", {"backbone": self.source.hash(), "unet": self.unet, **self._maps})
