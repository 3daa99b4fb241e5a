"""A run may begin from what another run, or another program, has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtune.backbone import Pretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.backbone.words import word_vectors
from sdtune.errors import UserError
from sdtune.exporting import Export, find_artifact
from sdtune.formats import diffusers_lora
from sdtune.methods import ControlNet, LoRA, TextualInversion


def moved(model: Any) -> Any:
    """Configured, every open tensor at a value of its own."""
    model.configure_model()
    rng = torch.Generator().manual_seed(1)
    for _, parameter in model.trainable():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    return model


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "own", [{}, {"alpha_policy": "constant", "alpha": 6.0}, {"alpha_policy": "rslora", "alpha": 3.0}], ids=str
)
def test_a_lora_begins_where_a_file_ends(tiny: Path, tmp_path: Path, form: Any, own: dict[str, Any]) -> None:
    source = Pretrained(str(tiny))
    first = moved(LoRA(backbone=source, rank=4, alpha_policy="constant", alpha=2.0))
    diffusers_lora.write(tmp_path / "a" / diffusers_lora.FILE_NAME, first.weights(), {})
    [file] = Export(form, dtype="fp32").write(find_artifact(tmp_path / "a", "artifact"), source, tmp_path / form)
    second = LoRA(backbone=source, rank=4, weights=str(file), **own)
    second.configure_model()
    one, other = first.weights().folded(), second.weights().folded()
    for path, (down, up) in one.pairs.items():
        torch.testing.assert_close(other.pairs[path][1] @ other.pairs[path][0], up @ down, rtol=1e-4, atol=1e-5)


def test_a_lora_of_other_ranks_or_sites_is_refused(tiny: Path, tmp_path: Path) -> None:
    first = moved(LoRA(backbone=Pretrained(str(tiny)), rank=4))
    diffusers_lora.write(tmp_path / diffusers_lora.FILE_NAME, first.weights(), {})
    with pytest.raises(
        UserError, match=r"^method\.weights: .* has rank 4 in .* and 8 in this run; give method\.rank=4"
    ):
        LoRA(backbone=Pretrained(str(tiny)), weights=str(tmp_path)).configure_model()
    with pytest.raises(UserError, match=r"^method\.weights: .*no such module.*method\.targets"):
        LoRA(
            backbone=Pretrained(str(tiny)), rank=4, targets=["cross_attention"], weights=str(tmp_path)
        ).configure_model()
    with pytest.raises(UserError, match=r"^method\.weights: /no/such does not exist"):
        LoRA(backbone=Pretrained(str(tiny)), weights="/no/such")


@pytest.mark.parametrize("form", ["diffusers", "single_file", "without a prefix"])
def test_a_controlnet_begins_where_another_ends(tiny: Path, tmp_path: Path, form: Any) -> None:
    source = Pretrained(str(tiny))
    first = moved(ControlNet(backbone=source))
    first.artifact(tmp_path / "artifact", "net")
    wanted = "diffusers" if form == "diffusers" else "single_file"
    [place] = Export(wanted, dtype="fp32").write(
        find_artifact(tmp_path / "artifact", "artifact"), source, tmp_path / "out"
    )
    if form == "without a prefix":
        save_file({k.removeprefix("control_model."): v for k, v in load_file(place).items()}, place)
    second = ControlNet(backbone=source, weights=str(place))
    second.configure_model()
    one, other = first.controlnet.state_dict(), second.controlnet.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_file_that_is_no_controlnet_is_refused(tiny: Path, tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"^method\.weights: .*x\.safetensors lacks input_blocks\."):
        ControlNet(backbone=Pretrained(str(tiny)), weights=str(tmp_path / "x.safetensors")).configure_model()


@pytest.mark.parametrize("form", ["learned_embeds", "embeddings/a"])
def test_a_word_begins_where_another_ends(tiny: Path, tmp_path: Path, form: str) -> None:
    source = Pretrained(str(tiny))
    first = moved(TextualInversion(backbone=source, new_tokens=[NewToken("<a>", "cat", 2)]))
    first.artifact(tmp_path, "a")
    token = NewToken("<b>", vectors=2, weights=str(tmp_path / f"{form}.safetensors"))
    second = TextualInversion(backbone=source, new_tokens=[token])
    second.configure_model()
    assert torch.equal(word_vectors(first.backbone)["<a>"][0], word_vectors(second.backbone)["<b>"][0])
    longer = NewToken("<b>", vectors=3, weights=token.weights)
    third = TextualInversion(backbone=source, new_tokens=[longer])
    with pytest.raises(UserError, match=r"holds 2 x 32, and this token has 3 x 32; give vectors: 2"):
        third.configure_model()


def test_a_word_begins_at_one_thing(tmp_path: Path) -> None:
    for token in (NewToken("<b>"), NewToken("<b>", "cat", weights="x")):
        with pytest.raises(UserError, match=r"^new_tokens: '<b>' needs a word to begin at: give init: cat, or weights"):
            TextualInversion(new_tokens=[token])
    with pytest.raises(UserError, match=r"^new_tokens: weights of '<b>': /no/such does not exist"):
        TextualInversion(new_tokens=[NewToken("<b>", weights="/no/such")])
