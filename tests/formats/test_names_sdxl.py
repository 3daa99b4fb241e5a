"""Key names at the true shapes of SDXL: kohya names follow the original layout, as in the conversion script."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from original_files import unet_names
from sdtune.backbone.families import SDXL
from sdtune.backbone.models import from_config
from sdtune.backbone.single_file import CONFIGS
from sdtune.formats import LoRAWeights, kohya_lora
from sdtune.formats.kohya_names import KohyaTable
from sdtune.formats.original.names import controlnet_entries
from sdtune.formats.original.table import original_names

INSIDE = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return from_config("unet", CONFIGS / "sdxl")


@pytest.fixture(scope="module")
def weights(unet, targets, pair):
    with torch.device("meta"):
        first, second = (from_config(name, CONFIGS / "sdxl") for name in ("text_encoder", "text_encoder_2"))
    modules = targets("unet", unet, INSIDE)
    modules |= targets("text_encoder", first, TEXT) | targets("text_encoder_2", second, TEXT)
    pairs = {path: pair(module, 4) for path, module in modules.items()}
    return LoRAWeights(pairs, dict.fromkeys(pairs, 4.0))


def table(weights, unet) -> KohyaTable:
    return SDXL.kohya_table(weights.pairs, dict(unet.config))


def test_kohya_has_722_unet_and_72_and_192_text_encoder_modules(unet, weights):
    tensors = kohya_lora.to_tensors(weights, table(weights, unet))
    names = {key.partition(".")[0] for key in tensors}
    counts = {
        start: sum(name.startswith(start) for name in names) for start in ("lora_unet_", "lora_te1_", "lora_te2_")
    }
    assert counts == {"lora_unet_": 722, "lora_te1_": 72, "lora_te2_": 192}
    assert sum(counts.values()) == len(names)
    unet_keys = [f"{path}.weight" for path, _ in unet.named_modules() if path.endswith(INSIDE)]
    original = unet_names(dict.fromkeys(unet_keys, torch.empty(0)), 3)
    expected = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in original}
    assert {name for name in names if name.startswith("lora_unet_")} == expected


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight", (4, 640)),
        ("lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k.lora_down.weight", (4, 2048)),
        ("lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj.lora_up.weight", (10240, 4)),
        ("lora_unet_output_blocks_5_1_proj_out.lora_up.weight", (640, 4)),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc2.lora_down.weight", (4, 3072)),
        ("lora_te2_text_model_encoder_layers_31_self_attn_out_proj.lora_down.weight", (4, 1280)),
    ],
)
def test_kohya_keys_and_shapes_equal_those_of_kohya_files(unet, weights, key, shape):
    assert kohya_lora.to_tensors(weights, table(weights, unet))[key].shape == shape


def test_original_and_diffusers_module_names_are_read(unet, weights, tmp_path):
    """Some trainers use the module names of diffusers for SDXL."""
    names = {module.paths[0]: name for name, module in table(weights, unet).modules.items()}
    sample_pairs = {
        path: (torch.rand(4, down.shape[1]), torch.rand(up.shape[0], 4))
        for path, (down, up) in [*weights.pairs.items()][:3]
    }
    for name_module in (
        names.__getitem__,
        (lambda module: "lora_unet_" + module[5:].replace(".", "_")),
    ):
        tensors = {
            f"{name_module(module)}.{part}": tensor
            for module, pair in sample_pairs.items()
            for part, tensor in zip(("lora_down.weight", "lora_up.weight"), pair)
        }
        parsed = kohya_lora.parse(tmp_path / "x", tensors, table(weights, unet))
        assert parsed.pairs.keys() == sample_pairs.keys()


def test_controlnet_names_equal_those_of_the_original_code(unet):
    from diffusers import ControlNetModel

    with torch.device("meta"):
        sd15 = ControlNetModel.from_unet(from_config("unet", CONFIGS / "sd15"), load_weights_from_unet=False)
    names = set(original_names(controlnet_entries(sd15.state_dict(), dict(sd15.config))).values())
    assert len(names) == 340  # as in lllyasviel's control_v11 files
    assert {
        "time_embed.0.weight",
        "input_hint_block.14.bias",
        "zero_convs.11.0.weight",
        "middle_block_out.0.bias",
    } <= names
    assert {"input_blocks.11.0.out_layers.3.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"} <= names
    assert not any("zero_convs.12" in name or "input_hint_block.15" in name for name in names)
