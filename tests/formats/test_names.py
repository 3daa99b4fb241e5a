"""Key names at the true shapes of SD 1.5, on meta tensors; a round trip through sdtune would not verify them."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_files import sd1_table
from sdtune.formats import LoRAWeights, diffusers_lora, kohya_lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
KOHYA = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    return unet, text


@pytest.fixture(scope="module")
def weights(sd15, targets, pair):
    unet, text = sd15
    modules = targets("unet", unet, KOHYA) | targets("text_encoder", text, TEXT)
    pairs = {path: pair(module, 8) for path, module in modules.items()}
    return LoRAWeights(pairs, dict.fromkeys(pairs, 4.0))


def test_attention_has_128_modules_and_199296_parameters_per_rank(sd15, targets, pair):
    modules = targets("unet", sd15[0], ATTENTION)
    assert len(modules) == 128
    assert sum(tensor.numel() for module in modules.values() for tensor in pair(module, 1)) == 199_296


def test_kohya_names_are_module_paths_with_underscores(sd15, weights):
    unet, text = sd15
    # kohya's rule, applied to the models. Its text encoder names contain `text_model`, as in transformers < 5.6.
    names = {f"lora_unet_{path}".replace(".", "_") for path, _ in unet.named_modules() if path.endswith(KOHYA)}
    paths = [path.removeprefix("text_model.") for path, _ in text.named_modules() if path.endswith(TEXT)]
    texts = {f"lora_te_text_model_{path}".replace(".", "_") for path in paths}
    assert (len(names), len(texts)) == (192, 72)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert kohya_lora.to_tensors(weights, sd1_table(weights.pairs)).keys() == {
        f"{name}.{part}" for name in names | texts for part in parts
    }


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", (8, 320)),
        ("lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k.lora_down.weight", (8, 768)),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight", (1280, 8)),
        ("lora_unet_up_blocks_3_attentions_2_proj_in.lora_down.weight", (8, 320, 1, 1)),
        ("lora_unet_up_blocks_3_attentions_2_proj_out.lora_up.weight", (320, 8, 1, 1)),
        ("lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_up.weight", (10240, 8)),
        ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_ff_net_2.lora_down.weight", (8, 5120)),
        ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_ff_net_2.alpha", ()),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", (8, 768)),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight", (3072, 8)),
        ("lora_te_text_model_encoder_layers_7_self_attn_out_proj.alpha", ()),
    ],
)
def test_kohya_keys_and_shapes_equal_those_of_kohya_files(weights, key, shape):
    tensor = kohya_lora.to_tensors(weights, sd1_table(weights.pairs))[key]
    assert tensor.shape == shape
    assert tensor.dtype == torch.float32


def test_diffusers_keys_are_module_paths_with_text_model(weights):
    tensors = diffusers_lora.to_tensors(weights)
    assert len(tensors) == 2 * (192 + 72)
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert tensors[f"{attention}.lora_A.weight"].shape == (8, 320)
    assert tensors[f"{attention}.lora_B.weight"].shape == (320, 8)
    assert tensors["text_encoder.text_model.encoder.layers.11.mlp.fc2.lora_A.weight"].shape == (8, 3072)
    assert all(key.startswith(("unet.", "text_encoder.text_model.encoder.")) for key in tensors)
