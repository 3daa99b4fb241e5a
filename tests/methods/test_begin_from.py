"""Training starts from the weights of another run or another program (``weights``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import Family, build_family
from running import arguments, train
from sdtune.backbone import Pretrained
from sdtune.backbone.layers import layers, module_path
from sdtune.backbone.new_token_vectors import token_vectors
from sdtune.backbone.new_tokens import NewToken
from sdtune.errors import UserError
from sdtune.exporting import Export, find_artifact
from sdtune.formats import diffusers_lora
from sdtune.methods import ControlNet, LoRA, TextualInversion


def with_random_weights(model: Any) -> Any:
    """The configured model with random values in all trainable tensors."""
    model.configure_model()
    rng = torch.Generator().manual_seed(1)
    for _, parameter in model.trainable():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    return model


@pytest.mark.parametrize("export_format", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "settings", [{}, {"alpha_policy": "constant", "alpha": 6.0}, {"alpha_policy": "rslora", "alpha": 3.0}], ids=str
)
def test_lora_starts_from_a_file(tiny: Path, tmp_path: Path, export_format: Any, settings: dict[str, Any]) -> None:
    source = Pretrained(str(tiny))
    first = with_random_weights(LoRA(backbone=source, rank=4, alpha_policy="constant", alpha=2.0))
    diffusers_lora.write(tmp_path / "a" / diffusers_lora.FILE_NAME, first.weights(), {})
    [file] = Export(export_format, dtype="fp32").write(
        find_artifact(tmp_path / "a", "artifact"), source, tmp_path / export_format
    )
    second = LoRA(backbone=source, rank=4, weights=str(file), **settings)
    second.configure_model()
    expected, loaded = first.weights().folded(), second.weights().folded()
    for path, (down, up) in expected.pairs.items():
        torch.testing.assert_close(loaded.pairs[path][1] @ loaded.pairs[path][0], up @ down, rtol=1e-4, atol=1e-5)


KOHYA_LAYERS = (".attentions.", ".resnets.", "samplers.", "text_encoder")
"""Parts of the paths that kohya's scripts train with a convolution rank; text_projection is OneTrainer's."""


def kohya_file(backbone: Any, path: Path, parts: tuple[str, ...] = KOHYA_LAYERS) -> dict[str, torch.Tensor]:
    """Write a LoRA with rank 4 and alpha 2 on the layers whose path contains one of ``parts``."""
    rng, tensors = torch.Generator().manual_seed(5), {}
    sdxl = backbone.facts.family.name == "sdxl"
    for component, name, layer in layers(backbone):
        if not any(part in f"{component}.{name}" for part in parts):
            continue
        prefix = {"denoiser": "unet", "text_encoder": "te1" if sdxl else "te", "text_encoder_2": "te2"}[component]
        key = f"lora_{prefix}_{module_path(backbone, component, name).partition('.')[2].replace('.', '_')}"
        out_features, in_shape = layer.weight.shape[0], layer.weight.shape[1:]
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, *in_shape, generator=rng)
        ups = torch.randn(out_features, 4, *[1] * (len(in_shape) - 1), generator=rng)
        tensors |= {f"{key}.lora_up.weight": ups, f"{key}.alpha": torch.tensor(2.0)}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize(
    ("family", "clip_skip"), [("sd1", 0), ("sd1", 1), pytest.param("sdxl", 0, marks=pytest.mark.slow)]
)
def test_weights_alone_set_layers_ranks_and_alphas(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: Family, clip_skip: int
) -> None:
    source = Pretrained(str(build_family(tmp_path / family, family)), clip_skip=clip_skip)
    in_file = kohya_file(source.load(), tmp_path / "kohya.safetensors")
    model = LoRA(backbone=source, weights=str(tmp_path / "kohya.safetensors"))
    with caplog.at_level("WARNING", "sdtune"):
        model.configure_model()
    weights, lines = model.weights(), caplog.messages
    assert {weights.rank(path) for path in weights.pairs} == {4}
    assert set(weights.alphas.values()) == {2.0}
    assert any("time_emb_proj" in path for path in weights.pairs)
    assert any("text_projection" in path for path in weights.pairs) == (family == "sdxl")
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert any(torch.equal(weights.pairs[path][0], tensor) for tensor in in_file.values())
    left_out = len(in_file) // 3 - len(weights.pairs)
    if clip_skip or family == "sdxl":  # the last layer of the first text encoder: 4 projections and 2 of the MLP
        assert left_out == 6
        [line] = lines
        assert line.startswith("WARNING: method.weights: kohya.safetensors: left out the pairs of layers")
    else:
        assert (left_out, lines) == (0, [])


def test_layers_and_ranks_that_are_set_must_fit_the_file(tiny: Path, tmp_path: Path) -> None:
    source = Pretrained(str(tiny))
    first = with_random_weights(LoRA(backbone=source, rank=4))
    diffusers_lora.write(tmp_path / diffusers_lora.FILE_NAME, first.weights(), {})
    settings: dict[str, Any] = {"backbone": source, "weights": str(tmp_path)}
    with pytest.raises(
        UserError, match=r"^method\.weights: .* rank 4 in the file and 8 in this run; set method\.rank=4"
    ):
        LoRA(rank=8, **settings).configure_model()
    with pytest.raises(UserError, match=r"^method\.weights: pairs of layers .*attn1.*; set method\.targets=null"):
        LoRA(targets=["cross_attention"], **settings).configure_model()
    with pytest.raises(UserError, match=r"^method\.alpha: got 4.0, but alpha is that of method\.weights"):
        LoRA(alpha=4.0, **settings)
    with pytest.raises(UserError, match=r"^method\.weights: /no/such does not exist"):
        LoRA(backbone=source, weights="/no/such")


def test_pairs_without_effect_and_ranks_of_a_block_name_what_to_set(tiny: Path, tmp_path: Path) -> None:
    source, file = Pretrained(str(tiny)), tmp_path / "it.safetensors"
    tensors = kohya_file(source.load(), file, (".attn1.", ".attn2."))
    blocks: dict[str, Any] = {"denoiser.mid_block": {"rank": 8}}
    with pytest.raises(UserError, match=r"set method\.blocks\.denoiser\.mid_block\.rank=4, or remove"):
        LoRA(backbone=source, weights=str(file), blocks=blocks).configure_model()
    save_file({key: torch.zeros(()) if key.endswith("alpha") else value for key, value in tensors.items()}, file)
    with pytest.raises(UserError, match=r"^method\.weights: it\.safetensors has alpha 0, .*method\.alpha_policy=rank"):
        LoRA(backbone=source, weights=str(file)).configure_model()


def test_run_is_not_resumed_with_other_ranks_or_alphas_in_its_file(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "it.safetensors", tmp_path / "run"
    tensors = kohya_file(Pretrained(str(tiny)).load(), file, (".attn1.",))
    overrides = [o for o in arguments(tiny, images, run, "trainer.max_steps=1") if not o.startswith("method.rank")]
    assert train(*overrides, f"method.weights={file}") == 0
    save_file({key: torch.tensor(3.0) if key.endswith("alpha") else value for key, value in tensors.items()}, file)
    assert train(f"resume={run}", "trainer.max_steps=2") == 2
    assert f"method.weights: {file} has changed since the run started; restore it" in capsys.readouterr().err
    save_file(tensors, file)
    assert train(f"resume={run}", "trainer.max_steps=2") == 0


def test_no_projections_is_not_all_projections(tiny: Path) -> None:
    model = LoRA(backbone=Pretrained(str(tiny)), targets=["cross_attention", "feed_forward"], projections=[])
    model.configure_model()
    paths = model.weights().pairs
    assert paths
    assert all(".ff." in path for path in paths)


def test_further_targets_get_rank_and_scale_of_the_file(tiny: Path, tmp_path: Path) -> None:
    source = Pretrained(str(tiny))
    file = tmp_path / "attention.safetensors"
    kohya_file(source.load(), file, (".attn1.", ".attn2."))
    targets: list[Any] = ["cross_attention", "self_attention", "feed_forward"]
    second = LoRA(backbone=source, weights=str(file), targets=targets)
    second.configure_model()
    weights = second.weights()
    new = [path for path in weights.pairs if ".ff." in path]
    assert {weights.rank(path) for path in new} == {4}
    assert {weights.alphas[path] for path in weights.pairs} == {2.0}
    assert all(not weights.pairs[path][1].any() for path in new)


@pytest.mark.parametrize("layout", ["diffusers", "single_file", "without a prefix"])
def test_controlnet_starts_from_a_file(tiny: Path, tmp_path: Path, layout: Any) -> None:
    source = Pretrained(str(tiny))
    first = with_random_weights(ControlNet(backbone=source))
    first.artifact(tmp_path / "artifact", "net")
    export_format = "diffusers" if layout == "diffusers" else "single_file"
    [path] = Export(export_format, dtype="fp32").write(
        find_artifact(tmp_path / "artifact", "artifact"), source, tmp_path / "out"
    )
    if layout == "without a prefix":
        save_file({k.removeprefix("control_model."): v for k, v in load_file(path).items()}, path)
    second = ControlNet(backbone=source, weights=str(path))
    second.configure_model()
    expected, loaded = first.controlnet.state_dict(), second.controlnet.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in expected.items())


def test_file_without_a_controlnet_is_refused(tiny: Path, tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"^method\.weights: .*x\.safetensors lacks input_blocks\."):
        ControlNet(backbone=Pretrained(str(tiny)), weights=str(tmp_path / "x.safetensors")).configure_model()


@pytest.mark.parametrize("stem", ["learned_embeds", "embeddings/a"])
def test_new_token_starts_from_a_file(tiny: Path, tmp_path: Path, stem: str) -> None:
    source = Pretrained(str(tiny))
    first = with_random_weights(TextualInversion(backbone=source, new_tokens=[NewToken("<a>", "cat", 2)]))
    first.artifact(tmp_path, "a")
    token = NewToken("<b>", vectors=2, weights=str(tmp_path / f"{stem}.safetensors"))
    second = TextualInversion(backbone=source, new_tokens=[token])
    second.configure_model()
    assert torch.equal(token_vectors(first.backbone)["<a>"][0], token_vectors(second.backbone)["<b>"][0])
    more_vectors = NewToken("<b>", vectors=3, weights=token.weights)
    third = TextualInversion(backbone=source, new_tokens=[more_vectors])
    with pytest.raises(UserError, match=r"contains 2 x 32, this token needs 3 x 32; set vectors: 2"):
        third.configure_model()


def test_new_token_needs_either_init_or_weights(tmp_path: Path) -> None:
    for token in (NewToken("<b>"), NewToken("<b>", "cat", weights="x")):
        with pytest.raises(
            UserError, match=r"^new_tokens: '<b>' needs exactly one of init and weights; set init: cat or weights"
        ):
            TextualInversion(new_tokens=[token])
    with pytest.raises(UserError, match=r"^new_tokens: weights of '<b>': /no/such does not exist"):
        TextualInversion(new_tokens=[NewToken("<b>", weights="/no/such")])
