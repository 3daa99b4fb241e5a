"""ControlNet weights, read from a diffusers folder or from a single file in the original layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from sdtune.backbone.foreign import unreadable_as_user_error
from sdtune.errors import UserError
from sdtune.files import read_json
from sdtune.formats import read_safetensors
from sdtune.formats.files import read_keys
from sdtune.formats.keys import check_keys
from sdtune.formats.original.names import controlnet_entries
from sdtune.formats.original.table import original_names
from sdtune.formats.pipeline import weights_name

WEIGHTS = weights_name("controlnet")
_PREFIX = "control_model."
_DIFFUSERS_KEY = "controlnet_cond_embedding.conv_in.weight"
_WIDTHS = (16, 32, 96, 256)  # channels of the control map embedding, as in diffusers and in the original code
_COMPARED_FIELDS = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "cross_attention_dim",
    "addition_embed_type",
)


def is_controlnet(keys: Collection[str]) -> bool:
    """Whether a file with these tensor names contains a ControlNet."""
    return any(
        key in keys for key in (f"{_PREFIX}input_hint_block.0.weight", "input_hint_block.0.weight", _DIFFUSERS_KEY)
    )


def find_controlnet(path: str, key: str, unet: Mapping[str, Any], factor: int) -> Path:
    """Check the ControlNet at ``path`` and return its local path; reads only configs and headers.

    Args:
        path: a folder in the diffusers layout, or a ``.safetensors`` file.
        key: config key of ``path``, for error messages.
        unet: UNet config of the backbone.
        factor: downscaling factor of the backbone's VAE.

    Raises:
        UserError: ``path`` is not a ControlNet, or it belongs to another backbone.
    """
    local_path = Path(path).expanduser()
    if local_path.is_file():
        if not is_controlnet(read_keys(local_path)):
            raise UserError(
                f"{path} is not a ControlNet", key=key, remedy="use the folder or .safetensors file of a ControlNet"
            )
        return local_path  # its tensor shapes are checked when it is loaded
    file = local_path / "config.json"
    if not file.is_file() or not (local_path / WEIGHTS).is_file():
        raise UserError(
            f"{path} is neither a folder with config.json and {WEIGHTS} nor a .safetensors file",
            key=key,
            remedy="set a ControlNet here (use adapters= for a LoRA)",
        )
    config = read_json(file, key)
    if config.get("_class_name") != "ControlNetModel":
        raise UserError(f"{path} is a {config.get('_class_name')}, not a ControlNetModel", key=key)
    for name in _COMPARED_FIELDS:
        if config.get(name) != unet.get(name):
            raise UserError(
                f"{path} has {name} {config.get(name)}, the backbone's UNet has {unet.get(name)}",
                key=key,
                remedy="use a ControlNet for this backbone",
            )
    channels = config.get("conditioning_embedding_out_channels")
    if not isinstance(channels, list) or not channels:
        raise UserError(
            f"{file} has no conditioning_embedding_out_channels", key=key, remedy="copy or download it again"
        )
    map_factor = 2 ** (len(channels) - 1)
    if map_factor != factor:
        raise UserError(
            f"{path} downscales its control map by {map_factor}, the backbone's VAE by {factor}",
            key=key,
            remedy="use a ControlNet for this backbone",
        )
    return local_path


def load_controlnet(path: Path, key: str, unet: UNet2DConditionModel, widths: Sequence[int]) -> ControlNetModel:
    """Load the ControlNet at ``path`` in float32.

    Args:
        path: a folder or a file.
        key: config key of the ControlNet, for error messages.
        unet: UNet of the backbone, which determines the architecture of a single-file ControlNet.
        widths: channels of the control map embedding of a single-file ControlNet.

    Raises:
        UserError: the files are damaged, or the tensors of a single file do not match the architecture.
    """
    if path.is_dir():
        with unreadable_as_user_error(path, key):
            return ControlNetModel.from_pretrained(
                path, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
    with torch.random.fork_rng(devices=[]):
        net = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=tuple(widths), load_weights_from_unet=False
        )
    tensors, _ = read_safetensors(path)
    names = original_names(controlnet_entries(net.state_dict(), dict(net.config)))
    if _DIFFUSERS_KEY in tensors:  # a single file with diffusers' names
        names = {name: name for name in names}
    # Some files omit the prefix.
    unprefixed = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    shapes = {names[name]: list(value.shape) for name, value in net.state_dict().items()}
    check_keys(f"{key}: {path}", {name: list(value.shape) for name, value in unprefixed.items()}, shapes)
    net.load_state_dict({name: unprefixed[original].float() for name, original in names.items()})
    return net


def embedding_widths(factor: int) -> tuple[int, ...]:
    """Channels of the control map embedding for a VAE with downscaling ``factor``; each step halves the sides.

    For a factor of 8 these are the four values of the original code; for other factors the list is shortened, or its
    last value is repeated.
    """
    halvings = factor.bit_length() - 1
    assert factor == 2**halvings
    return (*_WIDTHS, *_WIDTHS[-1:] * halvings)[: halvings + 1]
