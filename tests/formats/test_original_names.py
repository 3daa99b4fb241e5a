"""Single files at the true shapes, on meta tensors: names and shapes equal those of the public conversion script."""

from __future__ import annotations

import json

import pytest
import torch

from original_files import open_clip_names, unet_names, vae_names
from sdtune.backbone.families import FAMILIES, SD1, SD2, SDXL, family_of_file, family_of_folder
from sdtune.backbone.models import from_config
from sdtune.backbone.single_file import CONFIGS
from sdtune.formats.keys import canonical_key
from sdtune.formats.original import join, split

COUNTS = {"sd15": 1131, "sd21": 1214, "sdxl": 2515}
"""Number of tensors in the authors' files, without noise schedule buffers and the placeholders of SD 2.1."""


def config_and_tensors(kind):
    folder = CONFIGS / kind
    names = [n for n in ("unet", "vae", "text_encoder", "text_encoder_2") if (folder / n).is_dir()]
    configs = {name: json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in names}
    family = {"sd15": SD1, "sd21": SD2, "sdxl": SDXL}[kind]
    assert family_of_folder(folder, "key") is family
    assert (family.configs, set(family.components)) == (kind, set(names))
    with torch.device("meta"):
        loaded = {name: from_config(name, folder) for name in names}
    tensors = {
        name: {canonical_key(name, key): value for key, value in model.state_dict().items()}
        for name, model in loaded.items()
    }
    return family, configs, tensors


@pytest.mark.parametrize("kind", COUNTS)
def test_names_equal_those_of_the_script_and_convert_back(kind):
    family, configs, tensors = config_and_tensors(kind)
    single_file = join(tensors, family.layout, configs)
    unused_prefixes = (".resblocks.23.", "text_projection", "logit_scale") if kind == "sd21" else ()
    assert len([key for key in single_file if not any(part in key for part in unused_prefixes)]) == COUNTS[kind]
    levels = len(configs["unet"]["block_out_channels"])
    expected = {f"model.diffusion_model.{k}": v for k, v in unet_names(tensors["unet"], levels).items()}
    expected |= {f"first_stage_model.{k}": v for k, v in vae_names(tensors["vae"]).items()}
    first, second = tensors["text_encoder"], tensors.get("text_encoder_2")
    if kind == "sd15":
        expected |= {f"cond_stage_model.transformer.{k}": v for k, v in first.items()}
    elif kind == "sd21":
        expected |= {f"cond_stage_model.model.{k}": v for k, v in open_clip_names(first).items()}
    else:
        expected |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in first.items()}
        expected |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip_names(second).items()}
    assert {k: tuple(v.shape) for k, v in expected.items()}.items() <= {
        k: tuple(v.shape) for k, v in single_file.items()
    }.items()
    additional_endings = {key.rpartition(".")[2] for key in single_file.keys() - expected.keys()}
    allowed_endings = {"sd15": {"position_ids"}, "sdxl": {"position_ids", "logit_scale"}}
    # The last layer of SD 2.1's text encoder is never used; the file contains placeholders.
    additional_keys = {key for key in single_file.keys() - expected.keys() if ".resblocks.23." not in key}
    endings = {key.rpartition(".")[2] for key in additional_keys}
    assert endings == allowed_endings.get(kind, {"logit_scale", "text_projection"})
    assert additional_endings >= endings
    shapes = {key: list(value.shape) for key, value in single_file.items()}
    assert family_of_file(shapes, FAMILIES.values()) is family
    converted_back = split(single_file, family.layout, configs, {name: set(part) for name, part in tensors.items()})
    assert {
        name: {k: v.shape for k, v in component_tensors.items()} for name, component_tensors in converted_back.items()
    } == {name: {k: v.shape for k, v in component_tensors.items()} for name, component_tensors in tensors.items()}
