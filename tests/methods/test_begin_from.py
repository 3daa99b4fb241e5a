"""Training starts from the weights of another run or another program (``weights``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtune.backbone import Pretrained
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


def test_lora_file_with_other_rank_or_layers_is_refused(tiny: Path, tmp_path: Path) -> None:
    first = with_random_weights(LoRA(backbone=Pretrained(str(tiny)), rank=4))
    diffusers_lora.write(tmp_path / diffusers_lora.FILE_NAME, first.weights(), {})
    with pytest.raises(UserError, match=r"^method\.weights: .* has rank 4 in .* and 8 in this run; set method\.rank=4"):
        LoRA(backbone=Pretrained(str(tiny)), weights=str(tmp_path)).configure_model()
    with pytest.raises(UserError, match=r"^method\.weights: .*unknown target modules.*method\.targets"):
        LoRA(
            backbone=Pretrained(str(tiny)), rank=4, targets=["cross_attention"], weights=str(tmp_path)
        ).configure_model()
    with pytest.raises(UserError, match=r"^method\.weights: /no/such does not exist"):
        LoRA(backbone=Pretrained(str(tiny)), weights="/no/such")


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
