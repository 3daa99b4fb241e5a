"""ControlNets of SD 3: a copy of the first blocks of its transformer, over the latents of the control map."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3ControlNetModel
from torch import Tensor

from sdtune.backbone.controlnet import AddedInputs, ControlNetKind, cast_conditions
from sdtune.backbone.families.base import Facts
from sdtune.errors import UserError
from sdtune.formats import read_safetensors
from sdtune.formats.keys import check_keys

_MOST_LAYERS = 12
_MARKER = "pos_embed_input.proj.weight"
_COPIED = ("pos_embed", "time_text_embed", "context_embedder")


class SD3ControlNets(ControlNetKind):
    """ControlNets of SD 3 (diffusers' SD3ControlNetModel)."""

    model_class = SD3ControlNetModel
    marker_keys = (_MARKER,)
    encodes_maps = True
    compared_fields = ("in_channels", "patch_size", "num_attention_heads", "attention_head_dim", "joint_attention_dim")

    def check_config(self, path: str, key: str, config: Mapping[str, Any], facts: Facts) -> None:
        if config.get("joint_attention_dim") is None or config.get("extra_conditioning_channels"):
            raise UserError(
                f"{path} has blocks without text, or more inputs than a map, which sdtune does not run",
                key=key,
                remedy="use a ControlNet that copies the blocks of the transformer",
            )

    def load_file(self, file: Path, key: str, backbone: Any) -> SD3ControlNetModel:
        tensors, _ = read_safetensors(file)
        layers = len({name.split(".")[1] for name in tensors if name.startswith("controlnet_blocks.")})
        net = self._empty(backbone, layers)
        shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
        check_keys(f"{key}: {file}", {name: list(value.shape) for name, value in tensors.items()}, shapes)
        net.load_state_dict({name: value.float() for name, value in tensors.items()})
        return net

    def copy_of(self, backbone: Any, layers: int | None) -> SD3ControlNetModel:
        net = self._empty(backbone, layers or self._default_layers(backbone.denoiser.config))
        for name in _COPIED:
            getattr(net, name).load_state_dict(getattr(backbone.denoiser, name).state_dict())
        blocks = {
            name: value
            for name, value in backbone.denoiser.transformer_blocks.state_dict().items()
            if int(name.split(".")[0]) < len(net.transformer_blocks)
        }
        net.transformer_blocks.load_state_dict(blocks)
        return net

    def _empty(self, backbone: Any, layers: int) -> SD3ControlNetModel:
        """A ControlNet with ``layers`` blocks of the transformer; its own layers are zero."""
        config = {name: value for name, value in backbone.denoiser.config.items() if not name.startswith("_")}
        # The pooled text reaches the ControlNet in training, so that sampling must not replace it with zeros.
        config |= {"num_layers": layers, "force_zeros_for_pooled_projection": False}
        config["dual_attention_layers"] = [i for i in config["dual_attention_layers"] if i < layers]
        with torch.random.fork_rng(devices=[]):  # all random initial weights are replaced
            net: SD3ControlNetModel = SD3ControlNetModel.from_config(config)
        return net

    @staticmethod
    def _default_layers(config: Mapping[str, Any]) -> int:
        return max(1, min(_MOST_LAYERS, int(config["num_layers"]) // 2))

    def fresh_layers(self, controlnet: Any) -> list[tuple[str, Any]]:
        return []  # they are zero

    def check_layers(self, layers: int | None, denoiser: Mapping[str, Any]) -> None:
        most = int(denoiser["num_layers"]) // 2
        if layers is not None and layers > most:
            raise UserError(
                f"got {layers}, but the transformer has {denoiser['num_layers']} blocks, of which half can be copied",
                key="method.layers",
                remedy=f"set at most {most}",
            )

    def frozen_prefixes(self, controlnet: Any) -> tuple[str, ...]:
        # The text tokens of the last block are not used.
        last = f"transformer_blocks.{len(controlnet.transformer_blocks) - 1}"
        parts = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "ff_context.")
        return tuple(f"{last}.{part}" for part in parts)

    def encode(self, backbone: Any, maps: Tensor) -> Tensor:
        """Mean of the VAE's posterior for control maps, float32 [B, C, h, w]."""
        with torch.no_grad():
            mean: Tensor = backbone.encode_images(2 * maps - 1).chunk(2, dim=1)[0]
        return mean

    def residuals(
        self,
        backbone: Any,
        model: Any,
        noisy: Tensor,
        timesteps: Tensor,
        arguments: Mapping[str, Any],
        encoded: Tensor,
        strength: float = 1.0,
    ) -> AddedInputs:
        dtype = model.pos_embed_input.proj.weight.dtype
        inputs = cast_conditions(arguments, dtype)
        # A ControlNet without pooled text was trained on latents without the VAE's shift (InstantX; in diffusers,
        # StableDiffusion3ControlNetPipeline).
        has_pooled = not model.config.force_zeros_for_pooled_projection
        if not has_pooled:
            inputs["pooled_projections"] = torch.zeros_like(inputs["pooled_projections"])
        [*residuals] = model(
            noisy.to(dtype),
            controlnet_cond=backbone.scaled(encoded, shifted=has_pooled).to(dtype),
            conditioning_scale=strength,
            timestep=timesteps.expand(len(noisy)),
            return_dict=False,
            **inputs,
        )[0]
        return {"block_controlnet_hidden_states": tuple(residuals)}

    def names_in_file(self, tensors: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        return {key: key for key in tensors}
