"""kohya files of SD 3: modules that are joined or have their halves exchanged in the file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sd3_models import LAYERS, tiny_models, tiny_transformer
from sdtune.backbone.families import SD1, SD35_LARGE, SD35_MEDIUM
from sdtune.errors import UserError
from sdtune.formats import LoRAWeights, canonical, diffusers_lora, kohya_lora, read_lora, write_safetensors
from sdtune.formats.read import is_lora

BLOCK = "transformer.transformer_blocks.0"
LAST = f"transformer.transformer_blocks.{LAYERS - 1}"
SWAPPED = [f"{LAST}.norm1_context.linear", "transformer.norm_out.linear"]
SCALE = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer("sd35_medium")


@pytest.fixture(scope="module")
def layers(transformer):
    named = transformer.named_modules()
    return {f"transformer.{name}": layer for name, layer in named if isinstance(layer, nn.Linear | nn.Conv2d)}


@pytest.fixture(scope="module")
def table(transformer, layers):
    return SD35_MEDIUM.kohya_table(layers, dict(transformer.config))


def weights_of(layers, pair, ranks, alphas):
    generator = torch.Generator().manual_seed(1)
    pairs = {path: pair(layer, ranks[i % len(ranks)], generator) for i, (path, layer) in enumerate(layers.items())}
    return LoRAWeights(pairs, {path: alphas[i % len(alphas)] for i, path in enumerate(layers)})


def stored_change(tensors, name):
    down, up, alpha = (tensors[f"{name}.{part}"].double() for part in SCALE.values())
    return alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1))


def test_names_equal_those_of_kohya(table):
    block = "lora_unet_joint_blocks_0"
    expected = {f"{block}_x_block_{name}" for name in ("attn_qkv", "attn_proj", "attn2_qkv", "attn2_proj")}
    both = ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2", "adaLN_modulation_1")
    expected |= {f"{block}_{part}_{name}" for part in ("x_block", "context_block") for name in both}
    assert {name for name in table.modules if name.startswith(f"{block}_")} == expected
    others = {name for name in table.modules if "joint_blocks" not in name}
    assert others == {
        "lora_unet_x_embedder_proj",
        "lora_unet_context_embedder",
        *(f"lora_unet_{letter}_embedder_mlp_{i}" for letter in "ty" for i in (0, 2)),
        "lora_unet_final_layer_linear",
        "lora_unet_final_layer_adaLN_modulation_1",
    }


def test_text_encoders_have_the_prefixes_of_kohya():
    models = tiny_models("sd35_medium")
    paths = [
        canonical(f"{component}.{name}")
        for component in ("text_encoder", "text_encoder_2", "text_encoder_3")
        for name, layer in models[component].named_modules()
        if isinstance(layer, nn.Linear)
    ]
    names = SD35_MEDIUM.kohya_table(paths, dict(models["transformer"].config)).modules
    assert {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc2",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    } <= names.keys()
    assert len(names) == len(paths)


@pytest.mark.parametrize(
    ("ranks", "alphas"), [((4,), (3.0,)), ((4,), (3.0, 8.0)), ((4, 2, 6), (5.0,)), ((4, 2, 6, 3, 1), (3.0, 8.0, 1.0))]
)
def test_file_keeps_the_changes_and_returns_the_ranks(layers, table, pair, delta, tmp_path, ranks, alphas):
    weights = weights_of(layers, pair, ranks, alphas)
    tensors = kohya_lora.to_tensors(weights, table)
    for name, module in table.modules.items():
        change = torch.cat([delta(weights, path).flatten(1) for path in module.paths])
        if module.halves_swapped:
            change = torch.cat(change.chunk(2)[::-1])
        torch.testing.assert_close(stored_change(tensors, name), change, rtol=1e-5, atol=1e-7)
    write_safetensors(tmp_path / "it.safetensors", tensors, {})
    back, _ = read_lora(tmp_path / "it.safetensors", table)
    assert {path: back.rank(path) for path in back.pairs} == {path: weights.rank(path) for path in weights.pairs}
    for path in weights.pairs:
        torch.testing.assert_close(delta(back, path), delta(weights, path), rtol=1e-5, atol=1e-7)


def test_matrices_with_a_common_rank_and_alpha_return_exactly(layers, table, pair, tmp_path):
    weights = weights_of(layers, pair, (4,), (3.0,))
    back = kohya_lora.parse(tmp_path / "it", kohya_lora.to_tensors(weights, table), table)
    assert back.alphas == weights.alphas
    for path, matrices in weights.pairs.items():
        assert all(torch.equal(*both) for both in zip(back.pairs[path], matrices, strict=True)), path
    pointers = [tensor.data_ptr() for matrices in back.pairs.values() for tensor in matrices]
    assert len(pointers) == len(set(pointers))


def test_joined_b_is_block_diagonal_with_zeros_for_a_missing_part(layers, table, pair, tmp_path):
    queries = {f"{BLOCK}.attn.{name}": layers[f"{BLOCK}.attn.{name}"] for name in ("to_q", "to_v")}
    weights = weights_of(queries, pair, (4, 2), (3.0,))
    tensors = kohya_lora.to_tensors(weights, table)
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert tensors.keys() == {f"{name}.{part}" for part in SCALE.values()}
    up = tensors[f"{name}.lora_up.weight"]
    assert (up.shape, tensors[f"{name}.lora_down.weight"].shape) == ((24, 6), (6, 8))
    assert tensors[f"{name}.alpha"].item() == 4.5
    q, k, v = up.chunk(3)
    assert not any(block.any() for block in (q[:, 4:], k, v[:, :4]))
    back = kohya_lora.parse(tmp_path / "it", tensors, table)
    assert {path: back.rank(path) for path in back.pairs} == {path: weights.rank(path) for path in weights.pairs}


def test_joined_pair_trained_by_kohya_gives_each_part_its_rows(table, delta, tmp_path):
    name, generator = "lora_unet_joint_blocks_0_context_block_attn_qkv", torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 8, generator=generator), torch.randn(24, 4, generator=generator)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    back = kohya_lora.parse(tmp_path / "it", tensors, table)
    paths = [f"{BLOCK}.attn.add_{part}_proj" for part in "qkv"]
    assert back.alphas == dict.fromkeys(paths, 2.0)
    change = torch.cat([delta(back, path) for path in paths])
    torch.testing.assert_close(change, 0.5 * up.double() @ down.double())


def test_pairs_that_were_not_trained_are_not_lost(layers, table, pair, tmp_path):
    weights = weights_of(layers, pair, (4,), (3.0,))
    untrained = {path: (down, torch.zeros_like(up)) for path, (down, up) in weights.pairs.items()}
    tensors = kohya_lora.to_tensors(LoRAWeights(untrained, weights.alphas), table)
    back = kohya_lora.parse(tmp_path / "it", tensors, table)
    assert back.pairs.keys() == weights.pairs.keys()
    assert not any(up.any() for _, up in back.pairs.values())


def test_alpha_may_be_zero(layers, table, pair, tmp_path):
    weights = weights_of(layers, pair, (4, 2), (0.0,))
    back = kohya_lora.parse(tmp_path / "it", kohya_lora.to_tensors(weights, table), table)
    assert back.alphas == weights.alphas


@pytest.mark.parametrize("path", SWAPPED)
def test_rows_of_swapped_modules_are_exchanged(layers, table, pair, tmp_path, path):
    weights = weights_of({path: layers[path]}, pair, (2,), (2.0,))
    tensors = kohya_lora.to_tensors(weights, table)
    [up] = (tensor for key, tensor in tensors.items() if key.endswith(SCALE["up"]))
    scale, shift = weights.pairs[path][1].chunk(2)
    assert torch.equal(up, torch.cat([shift, scale]))
    assert torch.equal(kohya_lora.parse(tmp_path / "it", tensors, table).pairs[path][1], weights.pairs[path][1])


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lora_transformer."])
def test_names_of_onetrainer_are_read(layers, table, pair, tmp_path, prefix):
    weights = weights_of(layers, pair, (4,), (4.0,))
    tensors = {}
    for path, (down, up) in weights.pairs.items():
        name = path.removeprefix("transformer.")
        name = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4.0)}
    write_safetensors(tmp_path / "it.safetensors", tensors, {})
    back, _ = read_lora(tmp_path / "it.safetensors", table)
    assert back.alphas == weights.alphas
    assert all(torch.equal(back.pairs[path][1], up) for path, (_, up) in weights.pairs.items())


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model."])
def test_names_of_diffusers_and_peft_are_read(layers, table, pair, tmp_path, prefix):
    weights = weights_of({f"{BLOCK}.attn.to_q": layers[f"{BLOCK}.attn.to_q"]}, pair, (4,), (4.0,))
    tensors = {
        prefix + key.removeprefix("transformer."): value for key, value in diffusers_lora.to_tensors(weights).items()
    }
    write_safetensors(tmp_path / "it.safetensors", tensors, {})
    assert read_lora(tmp_path / "it.safetensors", table)[0].pairs.keys() == weights.pairs.keys()


def test_paths_of_the_original_layout_are_read(table, tmp_path):
    name = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(24, 2)}
    write_safetensors(tmp_path / "it.safetensors", tensors, {})
    back, _ = read_lora(tmp_path / "it.safetensors", table)
    assert back.pairs.keys() == {f"{BLOCK}.attn.to_{part}" for part in "qkv"}


def test_files_that_are_not_a_lora_of_the_model_are_refused(table, transformer, layers, tmp_path):
    path = tmp_path / "it.safetensors"

    def refusal(name, rows, table):
        write_safetensors(path, {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": rows}, {})
        with pytest.raises(UserError, match=r"it\.safetensors: ") as caught:
            read_lora(path, table)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert f"{name}: cannot divide 25 rows" in refusal(name, torch.ones(25, 2), table)
    assert "unknown target modules: lora_unet_joint_blocks_9" in refusal(
        "lora_unet_joint_blocks_9_x_block_attn_qkv", torch.ones(24, 2), table
    )
    large = SD35_LARGE.kohya_table(layers, {**transformer.config, "dual_attention_layers": ()})
    assert "unknown target modules" in refusal("lora_unet_joint_blocks_0_x_block_attn2_qkv", torch.ones(24, 2), large)
    assert "unknown target modules" in refusal(name, torch.ones(24, 2), SD1.kohya_table(["unet.conv_in"], {}))
    lycoris = "lycoris_transformer_blocks_0_attn_to_q"
    assert f"unsupported tensors: {lycoris}" in refusal(lycoris, torch.ones(8, 2), table)
    assert is_lora([f"{lycoris}.lora_up.weight"])
