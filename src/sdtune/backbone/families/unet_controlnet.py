"""ControlNets of a UNet: a copy of its encoder (Zhang et al. 2023); diffusers folders and single files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from sdtune.backbone.controlnet import AddedInputs, ControlNetKind, cast_conditions
from sdtune.backbone.families.base import Facts
from sdtune.errors import UserError
from sdtune.formats import read_safetensors
from sdtune.formats.keys import check_keys
from sdtune.formats.original.names import controlnet_entries
from sdtune.formats.original.table import original_names

_PREFIX = "control_model."
_DIFFUSERS_KEY = "controlnet_cond_embedding.conv_in.weight"
_WIDTHS = (16, 32, 96, 256)  # channels of the control map embedding, as in diffusers and in the original code


def embedding_widths(factor: int) -> tuple[int, ...]:
    """Channels of the control map embedding for a VAE with downscaling ``factor``; each step halves the sides.

    For a factor of 8 these are the four values of the original code; for other factors the list is shortened, or its
    last value is repeated.
    """
    halvings = factor.bit_length() - 1
    assert factor == 2**halvings
    return (*_WIDTHS, *_WIDTHS[-1:] * halvings)[: halvings + 1]


class UNetControlNets(ControlNetKind):
    """ControlNets of SD 1.x, SD 2.x and SDXL."""

    model_class = ControlNetModel
    marker_keys = (f"{_PREFIX}input_hint_block.0.weight", "input_hint_block.0.weight", _DIFFUSERS_KEY)
    compared_fields = (
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "cross_attention_dim",
        "addition_embed_type",
    )
    decoder = ("up_blocks.", "conv_norm_out.", "conv_out.")

    def check_config(self, path: str, key: str, config: Mapping[str, Any], facts: Facts) -> None:
        channels = config.get("conditioning_embedding_out_channels")
        if not isinstance(channels, list) or not channels:
            raise UserError(
                f"{path} has no conditioning_embedding_out_channels", key=key, remedy="copy or download it again"
            )
        map_factor = 2 ** (len(channels) - 1)
        if map_factor != facts.factor:
            raise UserError(
                f"{path} downscales its control map by {map_factor}, the backbone's VAE by {facts.factor}",
                key=key,
                remedy="use a ControlNet for this backbone",
            )

    def load_file(self, file: Path, key: str, backbone: Any) -> ControlNetModel:
        with torch.random.fork_rng(devices=[]):
            net = ControlNetModel.from_unet(
                backbone.denoiser,
                conditioning_embedding_out_channels=embedding_widths(backbone.facts.factor),
                load_weights_from_unet=False,
            )
        tensors, _ = read_safetensors(file)
        names = original_names(controlnet_entries(net.state_dict(), dict(net.config)))
        if _DIFFUSERS_KEY in tensors:  # a single file with diffusers' names
            names = {name: name for name in names}
        # Some files omit the prefix.
        unprefixed = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
        shapes = {names[name]: list(value.shape) for name, value in net.state_dict().items()}
        check_keys(f"{key}: {file}", {name: list(value.shape) for name, value in unprefixed.items()}, shapes)
        net.load_state_dict({name: unprefixed[original].float() for name, original in names.items()})
        return net

    def copy_of(self, backbone: Any, layers: int | None) -> ControlNetModel:
        with torch.random.fork_rng(devices=[]):  # random initial weights are replaced by the caller
            return ControlNetModel.from_unet(
                backbone.denoiser, conditioning_embedding_out_channels=embedding_widths(backbone.facts.factor)
            )

    def fresh_layers(self, controlnet: Any) -> list[tuple[str, Any]]:
        embedding = controlnet.controlnet_cond_embedding
        return [("conv_in", embedding.conv_in), *((f"blocks.{i}", b) for i, b in enumerate(embedding.blocks))]

    def check_layers(self, layers: int | None, denoiser: Mapping[str, Any]) -> None:
        if layers is not None:
            raise UserError(
                "a ControlNet of a UNet copies its encoder, which has a fixed number of layers",
                key="method.layers",
                remedy="remove it",
            )

    def frozen_prefixes(self, controlnet: Any) -> tuple[str, ...]:
        return ()

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
        # diffusers silently ignores surplus or missing residuals.
        assert len(model.controlnet_down_blocks) == skip_connection_count(backbone.denoiser)
        dtype = model.conv_in.weight.dtype
        skips, middle = model(
            noisy.to(dtype),
            timesteps,
            controlnet_cond=encoded.to(dtype),
            conditioning_scale=strength,
            return_dict=False,
            **cast_conditions(arguments, dtype),
        )
        return {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}

    def names_in_file(self, tensors: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        if config.get("addition_embed_type"):
            # SDXL ControlNets have no original layout; other programs expect the names of diffusers.
            return {key: key for key in tensors}
        return {key: f"{_PREFIX}{name}" for key, name in original_names(controlnet_entries(tensors, config)).items()}


def skip_connection_count(unet: Any) -> int:
    """Number of skip connections of ``unet``."""
    return 1 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in unet.down_blocks)
