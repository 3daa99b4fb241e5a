"""ControlNet weights, read from a diffusers folder or from a single file in the original layout."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from sdtune.errors import UserError
from sdtune.formats import read_safetensors
from sdtune.formats.files import read_keys
from sdtune.formats.keys import check_keys
from sdtune.formats.original.names import controlnet_names
from sdtune.formats.pipeline import weights_name

WEIGHTS = weights_name("controlnet")
_PREFIX = "control_model."
_THEIRS = "controlnet_cond_embedding.conv_in.weight"
_WIDTHS = (16, 32, 96, 256)  # of the map's embedding, as in diffusers and in the authors' code
_SHAPE = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "cross_attention_dim",
    "addition_embed_type",
)


def is_controlnet(keys: Collection[str]) -> bool:
    """Whether a file with tensors of these names holds a ControlNet."""
    return any(key in keys for key in (f"{_PREFIX}input_hint_block.0.weight", "input_hint_block.0.weight", _THEIRS))


def find_controlnet(path: str, key: str, unet: Mapping[str, Any], factor: int) -> Path:
    """The place of the net that ``path`` names; reads configs and headers alone.

    Raises:
        UserError: it is none, or of another backbone than one with the config ``unet`` and a VAE that shrinks by
            ``factor``.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if not is_controlnet(read_keys(place)):
            raise UserError(f"{path} holds no ControlNet", key=key, remedy="name one's folder or .safetensors file")
        return place  # its shapes are compared when it is loaded
    file = place / "config.json"
    if not file.is_file() or not (place / WEIGHTS).is_file():
        raise UserError(
            f"{path} is neither a folder with config.json and {WEIGHTS} nor a .safetensors file",
            key=key,
            remedy="name a ControlNet (a LoRA goes to adapters=)",
        )
    config = json.loads(file.read_text())
    if config.get("_class_name") != "ControlNetModel":
        raise UserError(f"{path} holds a {config.get('_class_name')} and not a ControlNetModel", key=key)
    for name in _SHAPE:
        if config.get(name) != unet.get(name):
            raise UserError(
                f"{path} has {name} {config.get(name)}, this one's UNet {unet.get(name)}; it is another's", key=key
            )
    theirs = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    if theirs != factor:
        raise UserError(
            f"{path} shrinks its map by {theirs}, this backbone's VAE by {factor}; it belongs to another one", key=key
        )
    return place


def load_controlnet(place: Path, key: str, unet: UNet2DConditionModel, widths: Sequence[int]) -> ControlNetModel:
    """The net in ``place``, float32.

    Args:
        place: a folder or a file.
        key: of the setting that named it.
        unet: of the backbone, whose shape a file's net has.
        widths: channels of a file's embedding of maps.
    """
    if place.is_dir():
        return ControlNetModel.from_pretrained(
            place, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    with torch.random.fork_rng(devices=[]):
        net = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=tuple(widths), load_weights_from_unet=False
        )
    tensors, _ = read_safetensors(place)
    names = controlnet_names(net.state_dict(), dict(net.config))
    if _THEIRS in tensors:  # diffusers' names in one file
        names = {name: name for name in names}
    # Some are kept without the prefix.
    found = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    shapes = {names[name]: list(value.shape) for name, value in net.state_dict().items()}
    check_keys(f"{key}: {place}", {name: list(value.shape) for name, value in found.items()}, shapes)
    net.load_state_dict({name: found[theirs].float() for name, theirs in names.items()})
    return net


def embedding_widths(factor: int) -> tuple[int, ...]:
    """Channels of the map's embedding, which halves the sides between each two, for a VAE that shrinks by ``factor``.

    The authors' four at a factor of 8, as many less or more as it takes elsewhere.
    """
    halvings = factor.bit_length() - 1
    assert factor == 2**halvings
    return (*_WIDTHS, *_WIDTHS[-1:] * halvings)[: halvings + 1]
