"""Single files at the true shapes, on meta tensors: the names and shapes of the public conversion script."""

from __future__ import annotations

import json

import pytest
import torch

from original_files import open_clip_names, unet_names, vae_names
from sdtune.backbone.models import from_config
from sdtune.backbone.single_file import CONFIGS
from sdtune.formats.keys import canonical_key
from sdtune.formats.original import Models, detect, join, split

COUNTS = {"sd15": 1131, "sd21": 1214, "sdxl": 2515}
"""Of the authors' files, the tables of the noise schedule and what SD 2.1 has stand-ins for apart."""


def models(kind):
    folder = CONFIGS / kind
    names = [n for n in ("unet", "vae", "text_encoder", "text_encoder_2") if (folder / n).is_dir()]
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in names}
    family = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[kind]
    with torch.device("meta"):
        found = {name: from_config(name, folder) for name in names}
    tensors = {
        name: {canonical_key(name, key): value for key, value in model.state_dict().items()}
        for name, model in found.items()
    }
    return Models(family, **configs), tensors


@pytest.mark.parametrize("kind", COUNTS)
def test_the_names_are_the_scripts_and_lead_back(kind):
    config, tensors = models(kind)
    file = join(tensors, config)
    unused = (".resblocks.23.", "text_projection", "logit_scale") if kind == "sd21" else ()
    assert len([key for key in file if not any(part in key for part in unused)]) == COUNTS[kind]
    levels = len(config.unet["block_out_channels"])
    wanted = {f"model.diffusion_model.{k}": v for k, v in unet_names(tensors["unet"], levels).items()}
    wanted |= {f"first_stage_model.{k}": v for k, v in vae_names(tensors["vae"]).items()}
    first, second = tensors["text_encoder"], tensors.get("text_encoder_2")
    if kind == "sd15":
        wanted |= {f"cond_stage_model.transformer.{k}": v for k, v in first.items()}
    elif kind == "sd21":
        wanted |= {f"cond_stage_model.model.{k}": v for k, v in open_clip_names(first).items()}
    else:
        wanted |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in first.items()}
        wanted |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip_names(second).items()}
    assert {k: tuple(v.shape) for k, v in wanted.items()}.items() <= {
        k: tuple(v.shape) for k, v in file.items()
    }.items()
    beside = {key.rpartition(".")[2] for key in file.keys() - wanted.keys()}
    allowed = {"sd15": {"position_ids"}, "sdxl": {"position_ids", "logit_scale"}}
    # Of SD 2.1's last layer, which its text encoder never uses, there are stand-ins.
    more = {key for key in file.keys() - wanted.keys() if ".resblocks.23." not in key}
    names = {key.rpartition(".")[2] for key in more}
    assert names == allowed.get(kind, {"logit_scale", "text_projection"})
    assert beside >= names
    assert detect({key: list(value.shape) for key, value in file.items()}) == config.family
    back = split(file, config, {name: set(own) for name, own in tensors.items()})
    assert {name: {k: v.shape for k, v in own.items()} for name, own in back.items()} == {
        name: {k: v.shape for k, v in own.items()} for name, own in tensors.items()
    }
