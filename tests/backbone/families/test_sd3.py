"""Single files of SD 3 and 3.5, with and without text encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sd3_models import configs_of, tensors_of, tiny_models
from sdtune.backbone.families import (
    FAMILIES,
    SD1,
    SD3_FAMILIES,
    SD35_MEDIUM,
    Family,
    FamilyName,
    family_of_file,
    family_of_folder,
)
from sdtune.backbone.models import model_shapes
from sdtune.backbone.single_file import CONFIGS
from sdtune.errors import UserError
from sdtune.files import read_json, write_json
from sdtune.formats import read_lora, write_safetensors
from sdtune.formats.keys import check_keys
from sdtune.formats.original import join, split
from sdtune.formats.original.checkpoint import stated_prediction

ENCODERS = ("clip_l", "clip_g", "t5xxl")
Tensors = dict[str, dict[str, Tensor]]
ALL = [*FAMILIES.values(), *SD3_FAMILIES]


@pytest.fixture(scope="module")
def model() -> tuple[Tensors, dict[str, dict[str, Any]]]:
    """Tensors and configs of a tiny SD 3.5 medium."""
    models = tiny_models("sd35_medium")
    return tensors_of(models), configs_of(models)


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def convert_back(file: dict[str, Tensor], model: tuple[Tensors, dict[str, dict[str, Any]]]) -> Tensors:
    return split(SD35_MEDIUM.usual_names(file), SD35_MEDIUM.layout, model[1], model[0])


@pytest.mark.parametrize("family", SD3_FAMILIES, ids=lambda family: family.name)
def test_configs_and_files_are_of_the_family(family: Family, tmp_path: Path) -> None:
    assert family_of_folder(CONFIGS / family.configs, "key") is family
    models = tiny_models(family.name)
    tensors, configs = tensors_of(models), configs_of(models)
    assert tuple(family.model_classes()[name] for name in family.components) == tuple(
        type(models[name]) for name in family.components
    )
    write_json(tmp_path / "model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]})
    write_json(tmp_path / "transformer/config.json", {**configs["transformer"], "_class_name": "SD3Transformer2DModel"})
    assert family_of_folder(tmp_path, "key") is family
    file = join(tensors, family.layout, configs)
    bare = {key.removeprefix("model.diffusion_model."): value for key, value in file.items()}
    for each in (file, bare):
        assert family_of_file(shapes_of(family.usual_names(each)), ALL) is family
    assert SD1.usual_names(file) == file


@pytest.mark.parametrize("family", SD3_FAMILIES, ids=lambda family: family.name)
def test_true_models_have_the_published_names(family: Family) -> None:
    folder = CONFIGS / family.configs
    shapes = {name: model_shapes(name, folder) for name in family.components}
    with torch.device("meta"):
        tensors = {name: {key: torch.empty(shape) for key, shape in shapes[name].items()} for name in shapes}
        configs = {name: json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in shapes}
    # The value of the projection is compared, which needs a device.
    tensors["text_encoder"]["text_projection.weight"] = torch.eye(768)
    file = join(tensors, family.layout, configs)
    t5 = "text_encoders.t5xxl.transformer"
    for key, shape in {
        "text_encoders.clip_l.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.q_proj.weight": (1280, 1280),
        "text_encoders.clip_g.transformer.text_projection.weight": (1280, 1280),
        f"{t5}.shared.weight": (32128, 4096),
        f"{t5}.encoder.embed_tokens.weight": (32128, 4096),  # diffusers needs both names
        f"{t5}.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        f"{t5}.encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.conv_in.weight": (512, 16, 3, 3),
        "model.diffusion_model.x_embedder.proj.weight": (configs["transformer"]["caption_projection_dim"], 16, 2, 2),
    }.items():
        assert file[key].shape == shape, key
    assert not any("clip_l.transformer.text_projection" in key for key in file)
    assert not any("quant_conv" in key for key in file)
    assert {key.split(".")[0] for key in file} == {"model", "first_stage_model", "text_encoders"}


def test_all_components_return(model: tuple[Tensors, dict[str, dict[str, Any]]]) -> None:
    tensors, configs = model
    file = join(tensors, SD35_MEDIUM.layout, configs, v_prediction=True, zero_snr=True)
    assert not {"v_pred", "ztsnr"} & file.keys()
    assert SD35_MEDIUM.layout.stored(file) == list(SD35_MEDIUM.components)
    back = convert_back(file, model)
    assert all(is_equal(back[name], tensors[name]) for name in tensors)
    unused = {"text_encoders.clip_g.logit_scale": torch.ones(1), "model_ema.decay": torch.ones(1)}
    position_ids = {"text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    back = convert_back({**file, **unused, **position_ids}, model)
    assert all(is_equal(back[name], tensors[name]) for name in tensors)


def test_file_of_the_transformer_alone_is_read(model: tuple[Tensors, dict[str, dict[str, Any]]]) -> None:
    tensors, configs = model
    file = join({"transformer": tensors["transformer"]}, SD35_MEDIUM.layout, configs)
    bare = {key.removeprefix("model.diffusion_model."): value for key, value in file.items()}
    assert SD35_MEDIUM.layout.stored(SD35_MEDIUM.usual_names(bare)) == ["transformer"]
    back = convert_back(bare, model)
    assert is_equal(back.pop("transformer"), tensors["transformer"])
    assert not any(back.values())


@pytest.mark.parametrize("missing", ENCODERS)
def test_file_may_lack_a_text_encoder(model: tuple[Tensors, dict[str, dict[str, Any]]], missing: str) -> None:
    tensors, configs = model
    file = {k: v for k, v in join(tensors, SD35_MEDIUM.layout, configs).items() if f".{missing}." not in k}
    lacking = SD35_MEDIUM.text_encoders[ENCODERS.index(missing)]
    assert set(SD35_MEDIUM.components) - set(SD35_MEDIUM.layout.stored(file)) == {lacking}
    back = convert_back(file, model)
    assert back.pop(lacking) == {}
    assert all(is_equal(back[name], tensors[name]) for name in back)


def test_names_of_the_token_table_of_t5(model: tuple[Tensors, dict[str, dict[str, Any]]]) -> None:
    tensors, configs = model
    file = join(tensors, SD35_MEDIUM.layout, configs)
    prefix = "text_encoders.t5xxl.transformer."
    second = {f"{prefix}encoder.embed_tokens.weight": file[f"{prefix}shared.weight"]}
    without_first = {key: value for key, value in file.items() if key != f"{prefix}shared.weight"}
    for each in ({**file, **second}, {**without_first, **second}):
        assert is_equal(convert_back(each, model)["text_encoder_3"], tensors["text_encoder_3"])


def test_first_encoder_has_no_projection_in_the_file(model: tuple[Tensors, dict[str, dict[str, Any]]]) -> None:
    tensors, configs = model
    file = {key: value.half() for key, value in join(tensors, SD35_MEDIUM.layout, configs).items()}
    key = "text_encoders.clip_l.transformer.text_projection.weight"
    assert key not in file
    assert f"{key.replace('clip_l', 'clip_g')}" in file
    # The reference does not use a projection that the file has.
    for each in (file, {**file, key: torch.rand(8, 8)}):
        projection = convert_back(each, model)["text_encoder"]["text_projection.weight"]
        assert projection.dtype == torch.float16
        assert torch.equal(projection, torch.eye(8).half())
    other = {**tensors, "text_encoder": {**tensors["text_encoder"], "text_projection.weight": torch.rand(8, 8)}}
    with pytest.raises(UserError, match=r"^format: text_projection\.weight differs .*; set format=pipeline"):
        join(other, SD35_MEDIUM.layout, configs)


def test_surplus_and_missing_tensors_are_reported(model: tuple[Tensors, dict[str, dict[str, Any]]]) -> None:
    tensors, configs = model
    file = join(tensors, SD35_MEDIUM.layout, configs)
    del file["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]
    file["model.diffusion_model.extra"] = file["text_encoders.clip_l.transformer.extra"] = torch.ones(1)
    back = convert_back(file, model)
    for name, message in (
        ("transformer", r"lacks transformer_blocks\.0\.attn\.to_k\.weight.*; contains model\.diffusion_model\.extra"),
        ("text_encoder", r"contains text_model\.extra"),
    ):
        with pytest.raises(UserError, match=message):
            check_keys("file", shapes_of(back[name]), shapes_of(tensors[name]))


def test_prediction_type_of_kohya_is_not_believed() -> None:
    """kohya's scripts write "epsilon" for these models too."""
    predictions = SD35_MEDIUM.layout.predictions
    for name in ("epsilon", "flow"):
        assert stated_prediction([], {"modelspec.prediction_type": name}, predictions) == "flow_prediction"
    with pytest.raises(UserError, match="states modelspec.prediction_type v; sdtune trains models with flow or eps"):
        stated_prediction([], {"modelspec.prediction_type": "v"}, predictions)


@pytest.mark.parametrize(
    ("family", "module", "remedy"),
    [
        ("sd1", "lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
        ("sdxl", "transformer.transformer_blocks.0.attn.to_q", "Stable Diffusion 3"),
        ("sd35_medium", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q", "backbone=sd15"),
        ("sd35_large", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "backbone=sdxl"),
        ("sd35_medium", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "backbone=sdxl"),
        ("sd3_medium", "lora_unet_joint_blocks_0_x_block_attn2_qkv", "backbone=sd35_medium"),
        ("sd35_medium", "transformer.transformer_blocks.37.attn.to_q", "backbone=sd35_large"),
    ],
)
def test_lora_of_another_family_is_refused_with_its_backbone(
    tmp_path: Path, family: FamilyName, module: str, remedy: str
) -> None:
    names = ("lora_A", "lora_B") if "." in module else ("lora_down", "lora_up")
    pair = (torch.ones(2, 6), torch.ones(5, 2))
    tensors = {f"{module}.{n}.weight": t for n, t in zip(names, pair, strict=True)}
    write_safetensors(tmp_path / "lora.safetensors", tensors, {"note": ""})
    first = "unet.conv_in" if family in ("sd1", "sdxl") else "transformer.transformer_blocks.0.attn.to_q"
    known = FAMILIES[family]
    config = read_json(CONFIGS / known.configs / known.denoiser / "config.json")
    table = known.kohya_table([first], config)
    with pytest.raises(UserError, match=f"unknown target modules.*; use .*{remedy}"):
        read_lora(tmp_path / "lora.safetensors", table)
