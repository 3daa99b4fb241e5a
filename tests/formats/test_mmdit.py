"""Names of SD 3's transformer in the original layout, as in Stability's code and in diffusers' conversion script."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from sd3_models import SETTINGS, tiny_transformer
from sdtune.backbone.models import from_config
from sdtune.backbone.single_file import CONFIGS
from sdtune.formats.original.mmdit import mmdit_entries
from sdtune.formats.original.table import TensorEntry, from_original, to_original

COUNTS = {
    "sd3_medium": (683, 2_028_328_000),
    "sd35_medium": (909, 2_243_171_520),
    "sd35_large": (1227, 8_056_627_520),
}
"""Number of tensors in the state dict of diffusers, and of parameters."""


def original_keys(layers: int, dual_layers: int, has_norm: bool) -> set[str]:
    """State dict of ``MMDiTX`` in Stability-AI/sd3.5, ``mmditx.py``, written down from its modules."""
    linear = ["x_embedder.proj", "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    linear += [f"{name}_embedder.mlp.{i}" for name in "ty" for i in (0, 2)]
    norms = []
    for i in range(layers):
        blocks = {"x_block": ["attn"], "context_block": ["attn"]}
        if i < dual_layers:
            blocks["x_block"].append("attn2")
        for block, attentions in blocks.items():
            path = f"joint_blocks.{i}.{block}"
            linear.append(f"{path}.adaLN_modulation.1")
            linear += [f"{path}.{attention}.qkv" for attention in attentions]
            if has_norm:
                norms += [f"{path}.{attention}.ln_{part}.weight" for attention in attentions for part in "qk"]
            if block == "x_block" or i < layers - 1:
                linear += [f"{path}.{attention}.proj" for attention in attentions]
                linear += [f"{path}.mlp.fc1", f"{path}.mlp.fc2"]
    return {"pos_embed", *norms, *(f"{name}.{part}" for name in linear for part in ("weight", "bias"))}


@pytest.mark.parametrize("name", COUNTS)
def test_names_equal_those_of_the_original_code(name):
    with torch.device("meta"):
        model = from_config("transformer", CONFIGS / name)
    tensors, config = model.state_dict(), dict(model.config)
    assert (len(tensors), sum(p.numel() for p in model.parameters())) == COUNTS[name]
    original = to_original(tensors, mmdit_entries(tensors, config))
    dual = len(config["dual_attention_layers"])
    assert original.keys() == original_keys(config["num_layers"], dual, config["qk_norm"] is not None)
    width = config["caption_projection_dim"]
    assert original["joint_blocks.0.x_block.attn.qkv.weight"].shape == (3 * width, width)
    assert original["joint_blocks.0.x_block.adaLN_modulation.1.bias"].shape == ((9 if dual else 6) * width,)
    assert original["pos_embed"].shape == (1, config["pos_embed_max_size"] ** 2, width)
    back = from_original(original, mmdit_entries(tensors, config))
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in tensors.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_values_equal_those_of_the_script_of_diffusers(name):
    model = tiny_transformer(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    tensors = model.state_dict()
    entries = mmdit_entries(tensors, dict(model.config))
    original = to_original(tensors, entries)
    for converted in (
        from_original(original, entries),
        convert_sd3_transformer_checkpoint_to_diffusers(dict(original)),
    ):
        assert converted.keys() == tensors.keys()
        assert all(torch.equal(converted[key], tensors[key]) for key in tensors)
    pointers = [value.data_ptr() for value in from_original(original, entries).values()]
    assert len(pointers) == len(set(pointers)), "the parts of a joined tensor share storage"


@pytest.mark.parametrize(
    ("original", "name"),
    [
        ("joint_blocks.2.context_block.adaLN_modulation.1", "transformer_blocks.2.norm1_context"),
        ("final_layer.adaLN_modulation.1", "norm_out"),
    ],
)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_shift_and_scale_are_swapped_in_the_last_layers(original, name, part):
    model = tiny_transformer("sd35_medium")
    tensors = model.state_dict()
    value = torch.arange(float(tensors[f"{name}.linear.{part}"].numel())).view_as(tensors[f"{name}.linear.{part}"])
    tensors[f"{name}.linear.{part}"] = value
    stored = to_original(tensors, mmdit_entries((), dict(model.config)))[f"{original}.{part}"]
    scale, shift = value.chunk(2)
    assert torch.equal(stored, torch.cat([shift, scale]))


def test_incomplete_and_damaged_tensors_are_left_to_the_check_of_names_and_shapes():
    entries = [
        TensorEntry("qkv", ("q", "k", "v")),
        TensorEntry("m", ("n",), "halves_swapped"),
        TensorEntry("p", ("r",), "convolution"),
    ]
    assert from_original({}, entries) == {}
    assert from_original({"qkv": torch.tensor(1.0)}, entries) == {}
    assert from_original({"qkv": torch.ones(2)}, entries).keys() == {"q", "k"}
    assert from_original({"m": torch.tensor(1.0)}, entries)["n"].dim() == 0
    assert from_original({"p": torch.ones(2, 3)}, entries)["r"].shape == (2, 3)
