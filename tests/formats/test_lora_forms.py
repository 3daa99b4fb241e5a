"""LoRA files in diffusers and kohya format: round trips, sources of alpha, metadata, hashes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from lora_files import read_diffusers, read_kohya, sd1_table, write_kohya
from sdtune.backbone.families import SD2
from sdtune.formats import LoRAWeights, diffusers_lora, kohya_lora, read_lora, read_safetensors
from sdtune.formats.lora_names import usual_names


def assert_same_changes(one, other, delta):
    assert one.pairs.keys() == other.pairs.keys()
    for module in one.pairs:
        torch.testing.assert_close(delta(one, module), delta(other, module), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alphas", [(3.0,), (3.0, 8.0)])
def test_round_trips_keep_the_weight_changes(make_weights, modules, delta, spec, tmp_path, alphas):
    weights = make_weights((4, 2), alphas)
    diffusers_file, kohya_file = tmp_path / diffusers_lora.FILE_NAME, tmp_path / "otter.safetensors"
    diffusers_lora.write(diffusers_file, weights, {})
    write_kohya(kohya_file, read_diffusers(diffusers_file), spec, {})
    assert_same_changes(read_kohya(kohya_file, modules), weights, delta)
    write_kohya(kohya_file, weights, spec, {})
    diffusers_lora.write(diffusers_file, read_kohya(kohya_file, modules), {})
    assert_same_changes(read_diffusers(diffusers_file), weights, delta)


def test_kohya_file_keeps_a_common_alpha_and_the_tensors(make_weights, modules, spec, tmp_path):
    weights = make_weights((4,), (3.0,))
    write_kohya(tmp_path / "it.safetensors", weights, spec, {})
    back = read_kohya(tmp_path / "it.safetensors", modules)
    assert back.alphas == weights.alphas
    for module, pair in weights.pairs.items():
        assert all(torch.equal(*both) for both in zip(back.pairs[module], pair, strict=True))


def test_kohya_file_has_alpha_equal_to_rank_if_alphas_differ(make_weights):
    weights = make_weights((4,), (3.0, 8.0))
    tensors = kohya_lora.to_tensors(weights, sd1_table(weights.pairs))
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {4.0}


def test_half_precision_weights_are_folded_in_float32():
    down, up = torch.ones(3, 2, dtype=torch.float16), torch.full((2, 3), 0.1, dtype=torch.float16)
    folded = LoRAWeights({"unet.a": (down, up)}, {"unet.a": 1.0}).folded()
    assert folded.alphas == {"unet.a": 3.0}
    assert torch.equal(folded.pairs["unet.a"][1], up.float() * (1 / 3))


def test_read_lora_detects_the_file_format(make_weights, modules, delta, spec, tmp_path):
    weights = make_weights()
    diffusers_lora.write(tmp_path / diffusers_lora.FILE_NAME, weights, {"sdtune_backbone_hash": "abc"})
    write_kohya(tmp_path / "otter.safetensors", weights, spec, {"sdtune_backbone_hash": "abc"})
    for path in (tmp_path, tmp_path / diffusers_lora.FILE_NAME, tmp_path / "otter.safetensors"):
        back, metadata = read_lora(path, sd1_table(modules))
        assert_same_changes(back, weights, delta)
        assert metadata["sdtune_backbone_hash"] == "abc"


def old_diffusers(key: str) -> str:
    """Names of diffusers before 0.17."""
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        for part, old in (("lora_A", "down"), ("lora_B", "up")):
            old_name = f".processor.{name.removesuffix('.0')}_lora.{old}.weight"
            key = key.replace(f".{name}.{part}.weight", old_name)
    return key


@pytest.mark.parametrize(
    "rename",
    [
        old_diffusers,
        lambda key: old_diffusers(key).removeprefix("unet."),
        lambda key: f"base_model.model.{key.removeprefix('unet.')}",
        lambda key: f"base_model.model.{key.removeprefix('unet.')}".replace(".weight", ".default.weight"),
        lambda key: "lora_" + key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    ],
    ids=["old diffusers", "old diffusers without unet", "peft", "peft with the adapter's name", "OneTrainer"],
)
def test_names_of_other_programs_are_read(make_weights, modules, delta, tmp_path, rename):
    weights = make_weights()
    unet = {path: pair for path, pair in weights.pairs.items() if path.startswith("unet.") and ".attn" in path}
    assert unet
    weights = LoRAWeights(unet, {path: weights.alphas[path] for path in unet})
    tensors = {rename(key): value for key, value in diffusers_lora.to_tensors(weights).items()}
    safetensors.torch.save_file(tensors, tmp_path / "it.safetensors")
    assert_same_changes(read_lora(tmp_path / "it.safetensors", sd1_table(modules))[0], weights, delta)


def test_paths_of_the_original_layout_become_names_of_kohya():
    path, name = "input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"diffusion_model.{path}.lora_{part}.weight": torch.ones(1) for part in "AB"}
    assert set(usual_names(tensors)) == {f"lora_unet_{name}.lora_{part}.weight" for part in ("down", "up")}


@pytest.mark.parametrize("convert", [dict, convert_state_dict_to_diffusers], ids=["peft names", "script names"])
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_of_files_written_by_diffusers_is_read(pipeline, modules, delta, tmp_path, rslora, convert):
    patterns = {} if rslora else {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_q": 5, "to_k": 9}}
    common = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "use_rslora": rslora}
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_out.0", "conv1"], **common, **patterns))
    pipeline.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"], **common))
    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert(get_peft_model_state_dict(pipeline.unet)),
        text_encoder_lora_layers=convert(get_peft_model_state_dict(pipeline.text_encoder)),
        unet_lora_adapter_metadata=settings(pipeline.unet),
        text_encoder_lora_adapter_metadata=settings(pipeline.text_encoder),
    )
    weights, metadata = read_lora(tmp_path, sd1_table(modules))
    expected = {}
    for component in ("unet", "text_encoder"):
        for path, module in getattr(pipeline, component).named_modules():
            if hasattr(module, "get_delta_weight"):
                name = path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"
                expected[f"{component}.{name}"] = module.get_delta_weight(next(iter(module.lora_A))).detach()
    assert weights.pairs.keys() == expected.keys()
    for module, change in expected.items():
        torch.testing.assert_close(delta(weights, module).float(), change, rtol=1e-5, atol=1e-7)

    # Alpha must not apply twice after writing the file again with the metadata that were read.
    diffusers_lora.write(tmp_path / "again.safetensors", weights, metadata)
    assert_same_changes(read_diffusers(tmp_path / "again.safetensors"), weights, delta)


def settings(model):
    config = next(iter(model.peft_config.values())).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def test_kohya_file_has_complete_metadata(make_weights, spec, tmp_path):
    write_kohya(tmp_path / "it.safetensors", make_weights(), spec, {"sdtune_backbone_hash": "abc"})
    _, metadata = read_safetensors(tmp_path / "it.safetensors")
    assert len(metadata.pop("sshs_model_hash")) == 64
    assert len(metadata.pop("sshs_legacy_hash")) == 8
    assert json.loads(metadata.pop("ss_network_args")) == {"conv_dim": "4", "conv_alpha": "3.0"}
    assert metadata == {
        "sdtune_backbone_hash": "abc",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "3.0",
        "ss_output_name": "otter",
        "ss_steps": "300",
        "ss_seed": "7",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "otter",
        "modelspec.resolution": "512x512",
        "modelspec.date": "2026-01-02T03:04:05+00:00",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "sks otter",
    }


def test_kohya_metadata_without_trigger_and_with_several_ranks(make_weights, spec, tmp_path):
    weights = make_weights((4, 2))
    linear = {module: pair for module, pair in weights.pairs.items() if pair[0].dim() == 2}
    spec = replace(spec, trigger=None, model=SD2.lora_names("v_prediction"), prediction_type="v")
    write_kohya(tmp_path / "it", LoRAWeights(linear, {m: weights.alphas[m] for m in linear}), spec, {})
    _, metadata = read_safetensors(tmp_path / "it")
    assert "modelspec.trigger_phrase" not in metadata
    assert metadata["ss_network_args"] == "{}"
    assert metadata["ss_network_dim"] == "Dynamic"
    assert (metadata["ss_v2"], metadata["ss_base_model_version"]) == ("True", "sd_v2_v")
    assert metadata["modelspec.prediction_type"] == "v"


def test_hashes_equal_those_of_kohya(spec, tmp_path):
    # Larger than 1 MiB + 64 KiB, so that the legacy hash covers its full window.
    pair = torch.randn(4, 80_000), torch.randn(8, 4)
    weights = LoRAWeights({"unet.mid_block.a": pair}, {"unet.mid_block.a": 3.0})
    path = tmp_path / "it.safetensors"
    write_kohya(path, weights, spec, {"note": "not a training field"})
    tensors, metadata = read_safetensors(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[header:]).hexdigest()
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    window = safetensors.torch.save(tensors, training)[1 << 20 : (1 << 20) + (64 << 10)]
    assert len(window) == 64 << 10
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


def test_hashes_ignore_metadata_that_are_not_training_fields(make_weights, spec, tmp_path):
    hashes = []
    for note in ("one", "another, and longer"):
        write_kohya(tmp_path / "it.safetensors", make_weights(), spec, {"note": note})
        _, metadata = read_safetensors(tmp_path / "it.safetensors")
        hashes.append((metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]))
    assert hashes[0] == hashes[1]
    # In a file smaller than 1 MiB, the window of the legacy hash is empty.
    assert hashes[0][1] == hashlib.sha256(b"").hexdigest()[:8]
